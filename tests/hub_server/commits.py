"""What a commit takes, and the history that it makes."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json

from tests.hub_server.cards import read_card
from tests.hub_server.objects import HubError, check_path, git_oid, lfs_pointer
from tests.hub_server.reply import as_json
from tests.hub_server.request import API, Request, route


class Commits(Request):
    """What a commit takes, and the history that it makes."""

    @route("POST", API + r"/preupload/(?P<rev>[^/]+)")
    def preupload(self, kind, repo, rev):
        """For each file: send it inside the commit ("regular"), or to storage first ("lfs")?"""
        found = self.get_repo(kind, repo, write=True)
        commit = self.store.commit(found, self.store.resolve(found, rev))
        payload = self.json_body()
        ignore = payload.get("gitIgnore")
        if ignore is None and ".gitignore" in commit["files"]:
            ignore = self.store.blob(commit["files"][".gitignore"]["sha256"]).read_text()
        patterns = [line.strip() for line in (ignore or "").splitlines() if line.strip() and line[0] != "#"]
        answer = []
        for file in payload.get("files", []):
            path, here = file["path"], commit["files"].get(file["path"])
            sample = base64.b64decode(file.get("sample") or "")
            large = self.hub.upload_mode != "regular" and bool(
                (here and here["lfs"])
                or file["size"] >= self.hub.lfs_threshold
                or b"\0" in sample
                or self.store.lfs_by_attributes(commit, path)
            )
            # A plain reading of .gitignore: a pattern matches the whole path or any one of its
            # parts.
            ignored = any(
                fnmatch.fnmatchcase(piece, p.strip("/")) for p in patterns for piece in (path, *path.split("/"))
            )
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": ignored,
                    "oid": here and (here["sha256"] if here["lfs"] else here["oid"]),
                }
            )
        return as_json({"files": answer, "commitOid": commit["oid"]})

    @route("POST", API + r"/commit/(?P<rev>[^/]+)")
    def make_commit(self, kind, repo, rev):
        """One line of JSON per step: a header, then files, large files, deletions.

        All or nothing.
        """
        found = self.get_repo(kind, repo)
        as_pr = self.flag("create_pr")  # whoever can read may propose
        if self.who is None or not as_pr:
            self.check_write(repo)
        try:
            steps = [json.loads(line) for line in self.body().splitlines() if line.strip()]
            header = steps[0]["value"] if steps and steps[0]["key"] == "header" else {}
        except (ValueError, KeyError, TypeError) as exc:
            raise HubError(400, f"Body is not the JSON lines of a commit: {exc}") from None
        if not header.get("summary"):
            raise HubError(400, "A commit needs a header line with a summary")
        with self.store.lock:
            found = self.get_repo(kind, repo)  # again, now that nobody else is writing
            ref = rev if rev.startswith("refs/") else f"refs/heads/{rev}"
            if ref not in found["refs"]:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            head = found["refs"][ref]
            parent = header.get("parentCommit")
            if parent and not head.startswith(parent) and not as_pr:
                raise HubError(412, "The branch was updated since you opened this page. Please refresh and try again.")
            base = self.store.resolve(found, parent) if parent and as_pr else head
            files = dict(self.store.commit(found, base)["files"])
            for step in steps[1:]:
                self.apply(step.get("key"), step.get("value") or {}, files)
            clash = next((p for p in files if any(f"{p}/" == q[: len(p) + 1] for q in files)), None)
            if clash:
                raise HubError(400, f"{clash} is both a file and a folder")
            if as_pr:
                number = 1 + sum(r.startswith("refs/pr/") for r in found["refs"])
                ref = f"refs/pr/{number}"
            commit = self.store.add_commit(
                found, ref, files, header["summary"], header.get("description") or "", self.who["user"], head
            )
        url = self.web_url(found)
        answer = {"success": True, "commitOid": commit["oid"], "commitUrl": f"{url}/commit/{commit['oid']}"}
        if as_pr:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        return as_json(answer)

    def apply(self, key: str, value: dict, files: dict) -> None:
        path = value.get("path", "").rstrip("/") if key == "deletedFolder" else value.get("path", "")
        check_path(path)
        if key == "file":
            try:
                data = base64.b64decode(value["content"], validate=True)
            except (binascii.Error, KeyError) as exc:
                raise HubError(400, f"{path}: content is not base64: {exc}") from None
            if path == "README.md" and (errors := read_card(data.decode("utf-8", "replace"))[1]):
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
            files[path] = self.store.text_entry(data)
        elif key == "lfsFile":
            sha256 = value.get("oid", "")
            if not self.store.has_blob(sha256, value.get("size")):
                raise HubError(400, f"{path}: its content {sha256} was never uploaded")
            size = self.store.blob(sha256).stat().st_size
            files[path] = {
                "oid": git_oid("blob", lfs_pointer(sha256, size)),
                "sha256": sha256,
                "size": size,
                "lfs": True,
            }
        elif key in ("deletedFile", "deletedFolder"):
            doomed = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path + "/"))]
            if not doomed:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            raise HubError(400, f"Unknown step in a commit: {key!r}")

    @route("GET", API + r"/commits/(?P<rev>[^/]+)")
    def commits(self, kind, repo, rev):
        found, commit = self.get_commit(kind, repo, rev)
        items = [
            {
                "id": c["oid"],
                "title": c["title"],
                "message": c["message"],
                "date": c["date"],
                "authors": [{"user": c["author"]}],
            }
            for c in self.store.history(found, commit["oid"])
        ]
        return self.page(items, self.hub.page_size, list)
