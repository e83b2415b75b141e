"""`python -m tests.hub_server --root /tmp/hub --port 8899`: the server by hand."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

from tests.hub_server.server import HubServer


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub on 127.0.0.1, for tests.")
    parser.add_argument("--root", default="hub-data", help="folder that holds the repositories")
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--storage-port", type=int, default=0)
    parser.add_argument("--tokens", help="JSON file: token -> {user, role, orgs, write}")
    parser.add_argument("--upload-mode", choices=("lfs", "regular"), default="lfs")
    parser.add_argument("--xet", action="store_true", help="serve Xet storage too ")
    parser.add_argument("--multipart-size", type=int, default=64 << 20, help="part size for large uploads, in bytes")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    tokens = json.loads(Path(args.tokens).read_text()) if args.tokens else None
    hub = HubServer(
        args.root,
        args.port,
        storage_port=args.storage_port,
        tokens=tokens,
        verbose=args.verbose,
        upload_mode=args.upload_mode,
        multipart_size=args.multipart_size,
        xet=args.xet,
    )
    with hub:
        print(f"HF_ENDPOINT={hub.url}   storage at {hub.storage_url}   data in {args.root}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
