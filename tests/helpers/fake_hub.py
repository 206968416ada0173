"""A hub of our own on this machine: what huggingface_hub asks of the real one, counted."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

COMMIT = "c" * 40


class FakeHub:
    """`with FakeHub({"config.json": b"{}"}) as hub:` one repository, `some/model`, at `hub.url`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: Counter[str] = Counter()
        """Requests by kind: `list`, or a file's name when its content was sent."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/some/model"):
                    names = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
                    told: object = {"id": "some/model", "sha": COMMIT, "siblings": names}
                    if "/tree/" in path:
                        told = [
                            {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                            for name, data in hub.files.items()
                        ]
                    hub.asked["list"] += 1
                    self.send(json.dumps(told).encode(), body=body)
                elif path.startswith("/some/model/resolve/") and (name := path.rsplit("/", 1)[1]) in hub.files:
                    hub.asked[name] += body
                    self.send(hub.files[name], body=body, etag=_oid(hub.files[name]))
                else:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def send(self, data: bytes, *, body: bool, etag: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("X-Repo-Commit", COMMIT)
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
