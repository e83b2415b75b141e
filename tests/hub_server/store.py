"""Repositories on disk: blobs by content, one JSON file per commit."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
from pathlib import Path

from tests.hub_server.objects import GITATTRIBUTES, HubError, git_oid, now, tree_oids


class Store:
    """Repositories under one folder.

        blobs/ab/abcd...                  contents, named by sha256, shared by all repos
        repos/<kind>/<owner>/<name>/repo.json             settings and refs
        repos/<kind>/<owner>/<name>/commits/<oid>.json    parent, message, and every file:
                                          path -> {oid (git), sha256, size, lfs}

    A commit is written in full before the branch moves to it, and repo.json is replaced
    in one step, so what a reader sees is always one whole commit.  Nothing is cached:
    a server started again on the same folder carries on where the last one stopped.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self.lock = threading.RLock()
        for name in ("blobs", "repos", "uploads"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Replace a file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.root / "uploads", delete=False) as tmp:
            tmp.write(data)
        os.replace(tmp.name, path)

    def blob(self, sha256: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise HubError(400, f"Not a sha256: {sha256!r}")
        return self.root / "blobs" / sha256[:2] / sha256

    def has_blob(self, sha256: str, size: int | None = None) -> bool:
        path = self.blob(sha256)
        return path.is_file() and (size is None or path.stat().st_size == size)

    def add_blob(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.has_blob(sha256):
            self.write(self.blob(sha256), data)
        return sha256

    def keep_upload(self, tmp: Path, sha256: str, expected: str) -> None:
        """Move a finished upload into place, if it is what it claims to be."""
        if sha256 != expected:
            tmp.unlink()
            raise HubError(400, f"Content does not match its name: got sha256 {sha256}, not {expected}", "BadDigest")
        self.blob(sha256).parent.mkdir(exist_ok=True)
        os.replace(tmp, self.blob(sha256))

    def folder(self, kind: str, repo_id: str) -> Path:
        name = r"\w([\w.-]{0,94}\w)?"
        if not re.fullmatch(f"{name}/{name}", repo_id, re.ASCII) or ".." in repo_id or "--" in repo_id:
            raise HubError(400, f"Invalid repo id: {repo_id!r}")
        return self.root / "repos" / kind / repo_id

    def find(self, kind: str, repo_id: str) -> dict | None:
        path = self.folder(kind, repo_id) / "repo.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def save(self, repo: dict) -> None:
        self.write(self.folder(repo["kind"], repo["id"]) / "repo.json", json.dumps(repo, indent=1).encode())

    def all_repos(self, kind: str) -> list[dict]:
        return [json.loads(p.read_bytes()) for p in sorted((self.root / "repos" / kind).glob("*/*/repo.json"))]

    def create(self, kind: str, repo_id: str, private: bool) -> dict:
        repo = {"kind": kind, "id": repo_id, "private": private, "gated": False, "createdAt": now(), "refs": {}}
        self.add_commit(
            repo,
            "refs/heads/main",
            {".gitattributes": self.text_entry(GITATTRIBUTES.encode())},
            "initial commit",
            "",
            "system",
            parent=None,
        )
        return repo

    def delete(self, repo: dict) -> None:
        folder = self.folder(repo["kind"], repo["id"])
        grave = self.root / "uploads" / secrets.token_hex(8)
        os.replace(folder, grave)  # gone at once; the files may take longer
        shutil.rmtree(grave, ignore_errors=True)

    def text_entry(self, data: bytes) -> dict:
        return {"oid": git_oid("blob", data), "sha256": self.add_blob(data), "size": len(data), "lfs": False}

    def commit(self, repo: dict, oid: str) -> dict:
        return json.loads((self.folder(repo["kind"], repo["id"]) / "commits" / f"{oid}.json").read_bytes())

    def history(self, repo: dict, oid: str | None):
        while oid:
            commit = self.commit(repo, oid)
            yield commit
            oid = commit["parent"]

    def resolve(self, repo: dict, revision: str) -> str:
        """A branch, a tag, a full ref or a commit id (5 characters are enough) -> commit id."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in repo["refs"]:
                return repo["refs"][ref]
        if re.fullmatch(r"[0-9a-f]{5,40}", revision):
            found = list((self.folder(repo["kind"], repo["id"]) / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, repo, ref, files, title, message, author, parent) -> dict:
        """Write a commit holding exactly `files`, then move `ref` to it."""
        trees, date = tree_oids(files), now()
        text = f"tree {trees['']}\nparent {parent}\nauthor {author} {date}\n\n{title}\n\n{message}"
        commit = {
            "oid": git_oid("commit", text.encode()),
            "parent": parent,
            "title": title,
            "message": message,
            "author": author,
            "date": date,
            "trees": trees,
            "files": files,
        }
        folder = self.folder(repo["kind"], repo["id"])
        self.write(folder / "commits" / f"{commit['oid']}.json", json.dumps(commit).encode())
        repo["refs"][ref] = commit["oid"]
        repo["lastModified"] = date
        self.save(repo)
        return commit

    def lfs_by_attributes(self, commit: dict, path: str) -> bool:
        """Does the repo's .gitattributes make this path a large file?"""
        entry = commit["files"].get(".gitattributes")
        for line in self.blob(entry["sha256"]).read_text().splitlines() if entry else []:
            pattern, *attributes = line.split() or [""]
            target = path if "/" in pattern else path.rpartition("/")[2]
            if "filter=lfs" in attributes and fnmatch.fnmatchcase(target, pattern):
                return True
        return False
