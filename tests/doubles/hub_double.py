"""A double of the Hugging Face hub's HTTP interface: repositories of models in memory, files up and down, git LFS.

It follows what huggingface_hub sends: repos/create, validate-yaml, preupload, LFS batch with upload and verify, commit;
revision, tree and resolve. Writing needs the token. Xet is left out (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from json_server import JsonHandler, running

TOKEN = "hf_of_the_double"


class HubDouble(ThreadingHTTPServer):
    """Repositories by id: files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # git LFS, by sha256
        self.through_lfs: set[str] = set()  # paths that came as LFS
        self.requests: list[str] = []

    def environment(self, cache: Any, **more: str) -> dict[str, str]:
        """Return the variables that send huggingface_hub here."""
        here = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        return {**here, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}

    def commit_id(self, repository: str) -> str:
        """Return what names the present state of a repository."""
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted((path, _sha1(data)) for path, data in files.items())).encode()).hexdigest()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # a blob of git


def _upload_mode(path: str, there: bytes | None) -> dict[str, Any]:
    """Return how a file is to be sent, and what it is in the repository now."""
    lfs = path.endswith(".safetensors")
    oid = {} if there is None else {"oid": hashlib.sha256(there).hexdigest() if lfs else _sha1(there)}
    return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid}


class _Handler(JsonHandler, BaseHTTPRequestHandler):
    server: HubDouble
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.describe(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[3])
        else:
            self.answer(404, {"error": "no such page"})

    do_HEAD = do_GET  # noqa: N815

    def describe(self, name: str, what: str | None) -> None:
        files = self.server.repositories.get(name)
        if files is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif what == "tree":
            self.answer(200, [{"type": "file", "path": p, "size": len(d), "oid": _sha1(d)} for p, d in files.items()])
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": self.server.commit_id(name), "siblings": siblings, "tags": []})

    def file(self, name: str, path: str) -> None:
        data = self.server.repositories.get(name, {}).get(path)
        if data is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, data, {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": self.server.commit_id(name)})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif path.endswith("/commit/main"):
            self.commit(path.split("/")[3:5], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(*self.respond(path, json.loads(body)))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        self.server.objects[self.path.rpartition("/")[2]] = data
        self.answer(200, b"")

    def respond(self, path: str, body: Any) -> tuple[int, Any]:
        """Answer the steps before a commit."""
        if path == "/api/repos/create":
            name = f"{body['organization']}/{body['name']}"
            if name in self.server.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}
            self.server.repositories[name] = {}
            self.server.private[name] = body.get("visibility") == "private"
            return 200, {"url": f"{self.server.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            card = yaml.safe_load(body["content"].split("---\n")[1])
            wrong = not re.fullmatch(r"[\w.-]+/[\w.-]+", str(card.get("base_model")))
            errors = [{"message": '"base_model" is not valid. Use a model id from https://hf.co/models.'}] * wrong
            return 400 if wrong else 200, {"errors": errors, "warnings": []}
        if "/preupload/" in path:
            there = self.server.repositories["/".join(path.split("/")[3:5])]
            return 200, {"files": [_upload_mode(file["path"], there.get(file["path"])) for file in body["files"]]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [{**one, **self.actions(one["oid"])} for one in body["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        if path == "/lfs/verify":
            data = self.server.objects.get(body["oid"], b"")
            right = (hashlib.sha256(data).hexdigest(), len(data)) == (body["oid"], body["size"])
            return 200 if right else 422, {}
        return 404, {"error": "no such page"}

    def actions(self, oid: str) -> dict[str, Any]:
        """Return where an object is to be sent; nothing if it is there."""
        if oid in self.server.objects:
            return {}
        upload, verify = ({"href": f"{self.server.endpoint}/lfs/{end}"} for end in (oid, "verify"))
        return {"actions": {"upload": upload, "verify": verify}}

    def commit(self, name: list[str], lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories["/".join(name)]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository[value["path"]] = self.server.objects[value["oid"]]
                self.server.through_lfs.add(value["path"])
        commit = self.server.commit_id("/".join(name))
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{'/'.join(name)}/commit/{commit}", "commitOid": commit})


def hub_double() -> AbstractContextManager[HubDouble]:
    """Run a double in a thread."""
    return running(HubDouble())
