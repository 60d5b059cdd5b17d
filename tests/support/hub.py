"""A model hub on this machine: the few requests by which huggingface_hub lists and fetches a repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Its repositories by id, each with its files by name. `fetched` are the files that were read, `tokens` were sent.

    A repository of `private` or `gated` needs `token`. `status` is answered to everything, if set.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = "hf_right"
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    status: int | None = None
    fetched: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve until the block ends; the URL is what HF_ENDPOINT must be."""
        with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            try:
                yield self.url
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path).removeprefix("/api/models").strip("/").split("/")
        name, action, rest = "/".join(path[:2]), path[2] if len(path) > 2 else "", "/".join(path[4:])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        files = hub.repositories.get(name)
        if files is not None:
            hub.tokens.add(token)
        if hub.status is not None:
            self._answer(hub.status, b"")
        elif token and token != hub.token:
            self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif files is None or (name in hub.private and not token):
            self._answer(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif action == "resolve" and name in hub.gated and not token:
            self._answer(401, b"", {"X-Error-Code": "GatedRepo"})
        elif action == "resolve" and rest in files:
            if with_body:
                hub.fetched.append(rest)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(files[rest]).hexdigest()}"'}
            self._answer(200, files[rest], headers, with_body=with_body)
        elif action == "resolve":
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif action == "tree":
            self._json([{"type": "file", "path": at, "size": len(data), "oid": at} for at, data in files.items()])
        else:
            siblings = [{"rfilename": at, "size": len(data)} for at, data in files.items()]
            self._json({"id": name, "sha": COMMIT, "siblings": siblings})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""
