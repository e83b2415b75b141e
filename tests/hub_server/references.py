"""Branches, tags and pull requests."""

from __future__ import annotations

import re

from tests.hub_server.objects import HubError
from tests.hub_server.reply import Reply, as_json
from tests.hub_server.request import API, Request, route


class References(Request):
    """Branches, tags and pull requests."""

    @route("GET", API + "/refs")
    def refs(self, kind, repo):
        found = self.get_repo(kind, repo)

        def under(prefix):
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in sorted(found["refs"].items())
                if ref.startswith(prefix)
            ]

        return as_json(
            {
                "branches": under("refs/heads/"),
                "tags": under("refs/tags/"),
                "converts": under("refs/convert/"),
                "pullRequests": under("refs/pr/"),
            }
        )

    def add_ref(self, kind, repo, ref, target) -> Reply:
        if not re.fullmatch(r"[\w.+/-]+", ref) or ".." in ref:
            raise HubError(400, f"Invalid reference: {ref!r}")
        with self.store.lock:
            found = self.get_repo(kind, repo, write=True)
            if ref in found["refs"]:
                raise HubError(409, f"Reference already exists: {ref}")
            found["refs"][ref] = self.store.resolve(found, target)
            self.store.save(found)
        return as_json({"ref": ref, "targetCommit": found["refs"][ref]})

    def drop_ref(self, kind, repo, ref) -> Reply:
        with self.store.lock:
            found = self.get_repo(kind, repo, write=True)
            if ref == "refs/heads/main":
                raise HubError(403, "The main branch cannot be deleted")
            if found["refs"].pop(ref, None) is None:
                raise HubError(404, f"Reference not found: {ref}", "RevisionNotFound")
            self.store.save(found)
        return as_json({"ok": True})

    @route("POST", API + r"/tag/(?P<rev>[^/]+)")
    def add_tag(self, kind, repo, rev):
        return self.add_ref(kind, repo, f"refs/tags/{self.json_body().get('tag')}", rev)

    @route("DELETE", API + r"/tag/(?P<name>[^/]+)")
    def drop_tag(self, kind, repo, name):
        return self.drop_ref(kind, repo, f"refs/tags/{name}")

    @route("POST", API + r"/branch/(?P<name>[^/]+)")
    def add_branch(self, kind, repo, name):
        if name.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {name}")
        return self.add_ref(kind, repo, f"refs/heads/{name}", self.json_body().get("startingPoint") or "main")

    @route("DELETE", API + r"/branch/(?P<name>[^/]+)")
    def drop_branch(self, kind, repo, name):
        return self.drop_ref(kind, repo, f"refs/heads/{name}")

    @route("POST", API + r"/super-squash/(?P<rev>[^/]+)")
    def super_squash(self, kind, repo, rev):
        message = self.json_body().get("message") or "Super-squash"
        with self.store.lock:
            found = self.get_repo(kind, repo, write=True)
            if f"refs/heads/{rev}" not in found["refs"]:
                raise HubError(404, f"Invalid branch: {rev}", "RevisionNotFound")
            files = self.store.commit(found, found["refs"][f"refs/heads/{rev}"])["files"]
            self.store.add_commit(found, f"refs/heads/{rev}", files, message, "", self.who["user"], None)
        return as_json({"ok": True})
