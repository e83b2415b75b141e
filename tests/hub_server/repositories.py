"""Accounts; creating, moving, describing and listing repositories."""

from __future__ import annotations

import json
import os

from tests.hub_server.cards import read_card, space_errors
from tests.hub_server.objects import URL_PREFIX, HubError, git_oid, lfs_pointer
from tests.hub_server.reply import Reply, as_json
from tests.hub_server.request import API, Request, route


class Repositories(Request):
    """Accounts; creating, moving, describing and listing repositories."""

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.who is None:
            raise HubError(401, "Invalid username or password.")
        user, role = self.who["user"], self.who["role"]
        token = {"displayName": f"{user}-{role}", "role": role, "createdAt": "2024-01-01T00:00:00.000Z"}
        if role == "fineGrained":
            token["fineGrained"] = {
                "scoped": [
                    {"entity": {"type": "model", "name": pattern}, "permissions": ["repo.write"]}
                    for pattern in self.who.get("write", [])
                ]
            }
        return as_json(
            {
                "type": "user",
                "id": git_oid("blob", user.encode())[:24],
                "name": user,
                "fullname": user,
                "email": f"{user}@localhost",
                "emailVerified": True,
                "isPro": False,
                "canPay": False,
                "orgs": [{"type": "org", "name": org, "fullname": org} for org in self.who.get("orgs", [])],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    @route("GET", API + r"/auth-check(?P<write>/write)?")
    def auth_check(self, kind, repo, write=""):
        self.get_repo(kind, repo, write=bool(write))
        return as_json({"ok": True})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        payload = self.json_body()
        data, errors, warnings = read_card(str(payload.get("content", "")))
        errors += space_errors(data) if payload.get("repoType") == "space" else []
        return as_json(
            {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]},
            400 if errors else 200,
        )

    def named_repo(self, payload: dict) -> tuple[str, str]:
        kind = (payload.get("type") or "model") + "s"
        if kind not in URL_PREFIX:
            raise HubError(400, f"Unknown repo type {payload.get('type')!r}")
        if self.who is None:
            raise HubError(401, "Invalid username or password.")
        return kind, f"{payload.get('organization') or self.who['user']}/{payload.get('name')}"

    @route("POST", "/api/repos/create")
    def create_repo(self):
        payload = self.json_body()
        kind, repo_id = self.named_repo(payload)
        self.store.folder(kind, repo_id)  # is the name a valid one?
        self.check_write(repo_id, create=True)
        if kind == "spaces" and payload.get("sdk") not in ("gradio", "docker", "static"):
            raise HubError(400, '"sdk" must be one of [gradio, docker, static]')
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        with self.store.lock:
            repo = self.store.find(kind, repo_id)
            if repo:
                url = self.web_url(repo)
                return as_json({"error": f"You already created this {kind[:-1]} repo: {repo_id}", "url": url}, 409)
            repo = self.store.create(kind, repo_id, private)
        return as_json({"url": self.web_url(repo), "name": repo_id, "id": repo_id, "private": private})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        kind, repo_id = self.named_repo(self.json_body())
        with self.store.lock:
            self.store.delete(self.get_repo(kind, repo_id, write=True))
        return Reply(b"OK")

    @route("POST", "/api/repos/move")
    def move_repo(self):
        payload = self.json_body()
        kind, source, target = payload.get("type", "model") + "s", payload["fromRepo"], payload["toRepo"]
        with self.store.lock:
            repo = self.get_repo(kind, source, write=True)
            self.check_write(target, create=True)
            if self.store.find(kind, target):
                raise HubError(409, f"{target} already exists")
            self.store.folder(kind, target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.store.folder(kind, source), self.store.folder(kind, target))
            self.store.save({**repo, "id": target})
        return as_json({"ok": True})

    @route("PUT", API + "/settings")
    def settings(self, kind, repo):
        payload = self.json_body()
        with self.store.lock:
            found = self.get_repo(kind, repo, write=True)
            if "visibility" in payload or "private" in payload:
                found["private"] = payload.get("visibility") == "private" or bool(payload.get("private"))
            if "gated" in payload:
                found["gated"] = payload["gated"]
            self.store.save(found)
        return as_json({"private": found["private"], "gated": found["gated"]})

    def describe(self, repo: dict, commit: dict, blobs: bool = False) -> dict:
        """What /api/models/<id> says about a repo."""
        readme = commit["files"].get("README.md")
        card = read_card(self.store.blob(readme["sha256"]).read_text("utf-8", "replace"))[0] if readme else {}
        library, task = card.get("library_name"), card.get("pipeline_tag")
        tags = [library, task, *(card.get("tags") or [])]
        if isinstance(card.get("license"), str):
            tags.append(f"license:{card['license']}")
        siblings = []
        for path, entry in sorted(commit["files"].items()):
            sibling = {"rfilename": path}
            if blobs:
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if entry["lfs"]:
                    sibling["lfs"] = {
                        "sha256": entry["sha256"],
                        "size": entry["size"],
                        "pointerSize": len(lfs_pointer(entry["sha256"], entry["size"])),
                    }
            siblings.append(sibling)
        info = {
            "_id": git_oid("blob", repo["id"].encode())[:24],
            "id": repo["id"],
            "modelId": repo["id"],
            "author": repo["id"].split("/")[0],
            "sha": commit["oid"],
            "private": repo["private"],
            "gated": repo["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "createdAt": repo["createdAt"],
            "lastModified": repo["lastModified"],
            "tags": list(dict.fromkeys(t for t in tags if isinstance(t, str))),
            "siblings": siblings,
            "usedStorage": sum(e["size"] for e in commit["files"].values()),
        }
        # Dates and the like in YAML are not JSON.
        card = json.loads(json.dumps(card, default=str))
        info |= {
            key: value
            for key, value in {"cardData": card, "library_name": library, "pipeline_tag": task}.items()
            if value
        }
        return info

    @route("GET", API + r"(?:/revision/(?P<rev>[^/]+))?")
    def repo_info(self, kind, repo, rev=None):
        found, commit = self.get_commit(kind, repo, rev)
        info = self.describe(found, commit, self.flag("blobs"))
        wanted = self.query.get("expand", []) + self.query.get("expand[]", [])
        if wanted:
            info = {key: info.get(key) for key in ("_id", "id", *wanted)}
        return as_json(info)

    @route("GET", r"/api/(?P<kind>models|datasets|spaces)")
    def list_repos(self, kind):
        author, search = self.query.get("author", [None])[0], self.query.get("search", [""])[0].lower()
        limit = int(self.query.get("limit", ["1000"])[0])
        repos = []
        for repo in self.store.all_repos(kind):
            visible = not repo["private"] or self.in_namespace(repo["id"])
            if visible and (author in (None, repo["id"].split("/")[0])) and search in repo["id"].lower():
                info = self.describe(repo, self.store.commit(repo, repo["refs"]["refs/heads/main"]))
                if set(self.query.get("filter", [])) <= set(info["tags"]):
                    repos.append(info)
        return as_json(repos[:limit])
