"""Names, hashes and paths of what a repository holds, as git and git-LFS write them."""

from __future__ import annotations

import datetime
import hashlib


CHUNK = 1 << 16
URL_PREFIX = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
# What a new repo's .gitattributes declares to be a large file.
LFS_PATTERNS = """*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lz4 *.mlmodel
    *.model *.msgpack *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar
    *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst
    *tfevents*""".split()
GITATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS)


class HubError(Exception):
    """A request answered with an error status.  `code` becomes X-Error-Code, from which
    the client picks the exception it raises (RepoNotFound, RevisionNotFound, EntryNotFound)."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_oid(kind: str, data: bytes) -> str:
    """The name git would give this object."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_oids(files: dict[str, dict]) -> dict[str, str]:
    """The git tree id of every folder; "" is the root."""
    folders: dict[str, dict] = {"": {}}
    for path, entry in files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            folders.setdefault(folder, {})
            folders["/".join(parts[: depth - 1])][parts[depth - 1]] = ("40000", folder)
        folders["/".join(parts[:-1])][parts[-1]] = ("100644", entry["oid"])
    oids: dict[str, str] = {}
    for folder in sorted(folders, key=lambda name: -len(name)):  # children before parents
        # git sorts a folder as if its name ended in "/"
        names = sorted(folders[folder].items(), key=lambda kv: kv[0] + "/" * (kv[1][0] == "40000"))
        body = b"".join(
            mode.encode() + b" " + name.encode() + b"\0" + bytes.fromhex(oids[ref] if mode == "40000" else ref)
            for name, (mode, ref) in names
        )
        oids[folder] = git_oid("tree", body)
    return oids


def check_path(path: str) -> str:
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(p in ("", ".", "..", ".git") for p in parts):
        raise HubError(400, f"Invalid path in repo: {path!r}")
    return path
