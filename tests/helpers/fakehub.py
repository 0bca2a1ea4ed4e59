"""The part of the Hugging Face hub's protocol that publishing and fetching a model use, on
localhost, for the real client. Repositories live in memory; "me" logs in with TOKEN."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_mine"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    sha: str = "0" * 40


@dataclass
class FakeHub:
    """asked: "METHOD path" of every request."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = self._repo("/".join(parts[2:4]))
            if repo is None:
                return
            if parts[4:5] == ["revision"] and parts[5] not in ("main", repo.sha):
                self._error(404, "RevisionNotFound")
            elif parts[4:5] == ["tree"]:
                self._json([self._entry(n, d) for n, d in repo.files.items()])
            else:
                names = [{"rfilename": n} for n in repo.files]
                self._json(
                    {
                        "id": "/".join(parts[2:4]),
                        "private": repo.private,
                        "sha": repo.sha,
                        "siblings": names,
                    }
                )
            return
        self._file(parts)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif not self._mine():
            self._error(401, None)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            if owner != "me":
                self._error(403, None, "You don't have the rights")
                return
            name = f"{owner}/{asked['name']}"
            hidden = asked.get("visibility", "public") == "private" or bool(asked.get("private"))
            self.state.repos[name] = Repo(hidden)
            self._json({"url": f"{self.state.url}/{name}", "name": name})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif parts[4] == "commit":
            name = "/".join(parts[2:4])
            repo = self.state.repos[name]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    data = base64.b64decode(entry["value"]["content"])
                    repo.files[entry["value"]["path"]] = data
            repo.sha = hashlib.sha1(body).hexdigest()
            self._json(
                {"commitUrl": f"{self.state.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}
            )
        else:
            self._error(404, None)

    def _note(self) -> None:
        self.state.asked.append(f"{self.command} {self.path}")

    def _mine(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        """The repository; answers for one that is not there or not shown."""
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self._mine()):
            self._error(404 if self._mine() else 401, "RepoNotFound")
            return None
        return repo

    def _file(self, parts: list[str]) -> None:
        repo = self._repo("/".join(parts[:2]))
        if repo is None:
            return
        name = "/".join(parts[4:])
        if name not in repo.files:
            self._error(404, "EntryNotFound")
            return
        self._send(
            200,
            repo.files[name],
            "application/octet-stream",
            {"ETag": f'"{_oid(repo.files[name])}"', "X-Repo-Commit": repo.sha},
        )

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _error(self, status: int, code: str | None, message: str = "no") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"{}", "application/json", headers)

    def _send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
