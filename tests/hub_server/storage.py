"""Large files: where to put them, putting them, checking them."""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
import time
from pathlib import Path

from tests.hub_server.objects import HubError
from tests.hub_server.reply import Reply, as_json
from tests.hub_server.request import WEB, Request, route


class Storage(Request):
    """Large files: where to put them, putting them, checking them."""

    @route("POST", WEB + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind, repo):
        found = self.get_repo(kind, repo, write=True)
        payload = self.json_body()
        multipart, objects = "multipart" in payload.get("transfers", ["basic"]), []
        for wanted in payload.get("objects", []):
            oid, size = wanted["oid"], int(wanted["size"])
            answer = {"oid": oid, "size": size}
            objects.append(answer)
            if self.store.has_blob(oid, size):
                continue  # nothing to upload
            url, part = self.hub.signed_url, self.hub.multipart_size
            upload = {"href": url("PUT", oid), "header": {}}
            if multipart and size > part:
                count = -(-size // part)
                upload = {
                    "href": url("DONE", oid),
                    "header": {"chunk_size": str(part), **{str(n): url("PART", oid, n) for n in range(1, count + 1)}},
                }
            answer["actions"] = {
                "upload": upload,
                "verify": {"href": f"{self.web_url(found)}.git/info/lfs/objects/verify", "header": {}},
            }
        return as_json({"transfer": "multipart" if multipart else "basic", "objects": objects})

    @route("POST", WEB + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, kind, repo):
        self.get_repo(kind, repo, write=True)
        payload = self.json_body()
        if not self.store.has_blob(payload["oid"], int(payload["size"])):
            raise HubError(404, "The upload is not there, or not of that size", "EntryNotFound")
        return as_json({"ok": True})

    def check_signature(self, operation: str, sha256: str) -> int:
        if "Authorization" in self.headers:
            raise HubError(400, "Only one auth mechanism allowed: this is a signed URL, it wants no token")
        part, expires, signature = (self.query.get(k, ["0"])[0] for k in ("part", "expires", "signature"))
        if not hmac.compare_digest(signature, self.hub.signature(operation, sha256, part, expires)):
            raise HubError(403, "SignatureDoesNotMatch")
        if int(expires) < time.time():
            raise HubError(403, "Request has expired")
        return int(part)

    @route("GET", r"/storage/(?P<sha256>[0-9a-f]{64})", origin="storage")
    def storage_get(self, sha256):
        self.check_signature("GET", sha256)
        return self.content(self.store.blob(sha256), {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    @route("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})", origin="storage")
    def storage_put(self, sha256):
        part = int(self.query.get("part", ["0"])[0])
        self.check_signature("PART" if part else "PUT", sha256)
        tmp, got, md5 = self.body_to_file()
        if part:
            os.replace(tmp, self.store.root / "uploads" / f"{sha256}.{part}")
        else:
            self.store.keep_upload(tmp, got, sha256)
        return Reply(headers={"ETag": f'"{md5}"'})

    @route("POST", r"/storage/(?P<sha256>[0-9a-f]{64})", origin="storage")
    def storage_complete(self, sha256):
        self.check_signature("DONE", sha256)
        parts = sorted(self.json_body()["parts"], key=lambda p: p["partNumber"])
        files = [self.store.root / "uploads" / f"{sha256}.{p['partNumber']}" for p in parts]
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.store.root / "uploads", delete=False) as tmp:
            for file, part in zip(files, parts):
                data = file.read_bytes() if file.is_file() else b""
                if part["etag"].strip('"') != hashlib.md5(data).hexdigest():
                    raise HubError(400, f"Part {part['partNumber']} is missing or is another one", "InvalidPart")
                tmp.write(data)
                digest.update(data)
        self.store.keep_upload(Path(tmp.name), digest.hexdigest(), sha256)
        for file in files:
            file.unlink(missing_ok=True)
        return as_json({"ok": True})
