"""A loopback stand-in for the Hugging Face Hub: repositories of small files in memory."""

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

COMMIT = "0" * 40


@dataclass
class Hub:
    """Repository name -> file name -> content, as uploads have left them."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    url: str = ""

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        """Answer the calls of `create_repo` and of a commit: the mode of each file, then the files themselves."""
        if path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            self.files.setdefault(name, {})
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":  # of a model card
            return {"errors": [], "warnings": []}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert found, path
        if found[2] == "preupload":
            return {
                "files": [
                    {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
            }
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitOid": COMMIT, "commitUrl": f"{self.url}/{found[1]}/commit/{COMMIT}", "success": True}

    def get(self, path: str) -> bytes | None:
        """The content of a file that a download asks for."""
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path)
        return self.files.get(found[1], {}).get(found[2]) if found else None


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve a `Hub` on this machine inside the `with`."""
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(json.dumps(made.post(self.path.partition("?")[0], body)).encode())

        def do_GET(self) -> None:
            content = made.get(self.path)
            self._send(content or b"", 404 if content is None else 200)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _send(self, data: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    made.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
