"""The files of one revision: listed, looked up, downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from tests.hub_server.objects import HubError, lfs_pointer
from tests.hub_server.reply import Reply, as_json
from tests.hub_server.request import API, WEB, Request, route


class Files(Request):
    """The files of one revision: listed, looked up, downloaded."""

    def entries(self, repo: dict, commit: dict, paths: list[str], expand: bool) -> list[dict]:
        """Files and folders as the tree and paths-info endpoints describe them."""
        last: dict[str, dict] = {}  # path -> the oldest commit since which it has been as it is now
        still = set(paths) if expand else set()
        for older in self.store.history(repo, commit["oid"]) if expand else ():
            for path in list(still):
                if older["files"].get(path, older["trees"].get(path)) == commit["files"].get(
                    path, commit["trees"].get(path)
                ):
                    last[path] = older
                else:
                    still.discard(path)
            if not still:
                break
        out = []
        for path in paths:
            if path in commit["files"]:
                entry = commit["files"][path]
                item = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
                if entry["lfs"]:
                    item["lfs"] = {
                        "oid": entry["sha256"],
                        "size": entry["size"],
                        "pointerSize": len(lfs_pointer(entry["sha256"], entry["size"])),
                    }
                    if xet := self.xet_hash(entry["sha256"]):
                        item["xetHash"] = xet
            elif path in commit["trees"]:
                item = {"type": "directory", "path": path, "oid": commit["trees"][path], "size": 0}
            else:
                continue
            if expand:
                item["lastCommit"] = {
                    "id": last[path]["oid"],
                    "title": last[path]["title"],
                    "date": last[path]["date"],
                }
            out.append(item)
        return out

    def page(self, items: list, default_limit: int, render) -> Reply:
        """One page of a list, with the next one's address in a Link header."""
        limit = int(self.query.get("limit", [default_limit])[0])
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + limit < len(items):
            query = {**self.query, "cursor": [str(start + limit)], "limit": [str(limit)]}
            headers["Link"] = (
                f'<http://{self.headers.get("Host")}{self.url_path}?{urlencode(query, doseq=True)}>; rel="next"'
            )
        return as_json(render(items[start : start + limit]), **headers)

    @route("GET", API + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?")
    def tree(self, kind, repo, rev, path=""):
        found, commit = self.get_commit(kind, repo, rev)
        path, expand = path.strip("/"), self.flag("expand")
        if path not in commit["trees"]:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound", {"X-Repo-Commit": commit["oid"]})
        prefix = f"{path}/" if path else ""
        everything = sorted([*commit["files"], *(t for t in commit["trees"] if t)])
        paths = [
            p for p in everything if p.startswith(prefix) and (self.flag("recursive") or "/" not in p[len(prefix) :])
        ]
        return self.page(
            paths, 50 if expand else self.hub.page_size, lambda some: self.entries(found, commit, some, expand)
        )

    @route("POST", API + r"/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, kind, repo, rev):
        found, commit = self.get_commit(kind, repo, rev)
        if "json" in self.headers.get("Content-Type", ""):
            payload = self.json_body()
            paths, expand = payload.get("paths", []), bool(payload.get("expand"))
        else:
            form = parse_qs(self.body().decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        return as_json(self.entries(found, commit, [p.strip("/") for p in paths], expand))

    @route("GET", WEB + r"/(?P<how>resolve|raw)/(?P<rev>[^/]+)/(?P<path>.+)")
    @route("GET", API + r"/(?P<how>resolve)/(?P<rev>[^/]+)/(?P<path>.+)")
    def resolve(self, kind, repo, how, rev, path):
        found, commit = self.get_commit(kind, repo, rev)
        headers = {"X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        entry = commit["files"].get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if entry["lfs"] and how == "raw":
            pointer = lfs_pointer(entry["sha256"], entry["size"])
            return Reply(pointer, headers={**headers, "ETag": f'"{entry["oid"]}"', "Content-Type": "text/plain"})
        if entry["lfs"]:
            if xet := self.xet_hash(entry["sha256"]):
                token = f"http://{self.headers.get('Host')}/api/{kind}/{repo}/xet-read-token/{commit['oid']}"
                headers |= {"X-Xet-Hash": xet, "Link": f'<{token}>; rel="xet-auth"'}
            headers |= {
                "X-Linked-Etag": f'"{entry["sha256"]}"',
                "X-Linked-Size": str(entry["size"]),
                "ETag": f'"{entry["sha256"]}"',
            }
            if self.hub.redirect_lfs:
                return Reply(status=302, headers={**headers, "Location": self.hub.signed_url("GET", entry["sha256"])})
        else:
            headers["ETag"] = f'"{entry["oid"]}"'
        return self.content(self.store.blob(entry["sha256"]), headers)

    def content(self, path: Path, headers: dict) -> Reply:
        """A file, or the part of it that Range asks for."""
        size = path.stat().st_size
        headers = {"Content-Type": "application/octet-stream", **headers}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").replace(" ", ""))
        if not wanted or wanted.groups() == ("", ""):
            return Reply(status=200, headers=headers, file=(path, 0, size))
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Reply(status=206, headers=headers, file=(path, start, stop - start))
