"""A Hub on this machine: enough of its HTTP interface to create, commit to, read and lose a model repository.

Every commit is kept, so that a revision gives what was there then. ``server.drops`` counts uploads of large files that
break off without an answer, as when a network goes away.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_test": "write", "hf_read": "read"}


@dataclass
class Repository:
    """Commits in order, each its id and the files after it."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def add(self, files: dict[str, bytes], message: str) -> str:
        listing = "".join(f"{name}:{hashlib.sha1(content).hexdigest()}\n" for name, content in sorted(files.items()))
        commit = hashlib.sha1(f"{len(self.commits)}{message}{listing}".encode()).hexdigest()
        self.commits.append((commit, files))
        self.messages.append(message)
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((entry for entry in self.commits if entry[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    """State of the Hub, and what went wrong on purpose."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.drops = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self._info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            return self._tree(found[1], found[2], found[3] or "")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        self._answer(404, {"error": f"no such page: {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path.startswith("/drops/"):  # no part of the Hub
            self.server.drops = int(path.rpartition("/")[2])
            self.server.large.clear()  # what has arrived is not sent again
            return self._answer(200, {})
        if path == "/api/validate-yaml":
            wrong = "license: nonsense" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of [apache-2.0, ...]'}] if wrong else []
            return self._answer(400 if wrong else 200, {"errors": errors, "warnings": []})
        if self._right() != "write":
            return self._answer(403 if self._right() else 401, {"error": "You may not write here."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path)
        if found and self._repository(found[1]):
            return getattr(self, f"_{found[2]}")(found[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        self._answer(404, {"error": f"no such page: {path}"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        if self.server.drops:
            self.server.drops -= 1
            self.close_connection = True
            return self.connection.close()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, {"error": "not what was announced"})
        self.server.large[oid] = content
        self._answer(200, {})

    def _right(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        return found if found and (not found.private or self._right()) else None

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit, or None after the answer that there is none."""
        repository = self._repository(name)
        if repository is None:
            self._answer(
                404 if self._right() else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
            return None
        found = repository.at(revision)
        if found is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def _info(self, name: str, revision: str) -> None:
        if found := self._at(name, revision):
            siblings = [{"rfilename": path} for path in sorted(found[1])]
            private = self.server.repositories[name].private
            described = {"id": name, "modelId": name, "sha": found[0], "private": private, "siblings": siblings}
            self._answer(200, described | {"tags": [], "downloads": 0, "likes": 0})

    def _tree(self, name: str, revision: str, under: str) -> None:
        if found := self._at(name, revision):
            files = {path: content for path, content in found[1].items() if path.startswith(under)}
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                for path, content in sorted(files.items())
            ]
            self._answer(200, entries)

    def _file(self, name: str, revision: str, path: str) -> None:
        if not (found := self._at(name, revision)):
            return
        if path not in found[1]:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = found[1][path]
        headers = {"ETag": f'"{_git_oid(content)}"', "X-Repo-Commit": found[0]}
        self._answer(200, content, headers | {"Content-Type": "application/octet-stream"})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        described = {"id": name, "name": name, "url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self._answer(409, {"error": "You already created this model repo"} | described)
        hidden = wanted.get("private") or wanted.get("visibility") == "private"  # by the version of the client
        self.server.repositories[name] = Repository(bool(hidden))
        self.server.repositories[name].add({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._answer(200, described)

    def _preupload(self, name: str, body: bytes) -> None:
        there = self.server.repositories[name].commits[-1][1]
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png", ".onnx")) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in there:
                content = there[file["path"]]
                entry["oid"] = hashlib.sha256(content).hexdigest() if mode == "lfs" else _git_oid(content)
            files.append(entry)
        self._answer(200, {"files": files})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
            objects.append(entry | ({} if entry["oid"] in self.server.large else {"actions": upload}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        files, message = dict(repository.commits[-1][1]), ""
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repository.commits[-1][0]):
                    return self._answer(412, {"error": "A commit has happened since"})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.add(files, message)
        self._answer(
            200, {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}
        )

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
