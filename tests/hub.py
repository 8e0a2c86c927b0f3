"""A hub on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeHub:
    """Just enough of the hub's HTTP interface for huggingface_hub itself, on loopback."""

    COMMIT = "c" * 40

    def __init__(self, repos: dict[str, dict[str, bytes]], host: str = "127.0.0.1") -> None:
        self.repos = repos  # "datasets/org/name" or "org/name" -> path -> content
        self.requests: list[str] = []
        self.cut_after: dict[str, int] = {}  # path -> bytes after which its next download is cut off
        self.stall_after: dict[str, int] = {}  # path -> bytes after which its next download says no more
        self.stalled = threading.Event()
        self.page: bytes | None = None  # an answer to everything, as a hotel's network gives it
        self.pace = 0  # bytes a second of a file; 0: as fast as it goes
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Quiet: `requests` has them."""

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            do_POST = do_GET

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: Any, body: bool) -> None:
        path = handler.path.partition("?")[0].lstrip("/")
        self.requests.append(f"{handler.command} {path}")
        if self.page is not None:
            return self._send(handler, 200, self.page, body, {})
        for repo, files in self.repos.items():
            api = f"api/{repo if repo.startswith('datasets/') else f'models/{repo}'}/"
            if path.startswith(api):
                if "/tree/" in path or "/paths-info/" in path:
                    asked = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)) or "{}")
                    content: Any = [
                        {"type": "file", "path": n, "size": len(d), "oid": "0" * 40}
                        for n, d in files.items()
                        if n in asked.get("paths", [n])
                    ]
                else:
                    siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                    content = {"id": repo, "sha": self.COMMIT, "siblings": siblings}
                return self._send(handler, 200, json.dumps(content).encode(), body, {})
            if path.startswith(f"{repo}/resolve/"):
                name = path.removeprefix(f"{repo}/resolve/").partition("/")[2]
                if name in files:
                    return self._file(handler, name, files[name], body)
                return self._send(handler, 404, b"", body, {"X-Error-Code": "EntryNotFound"})
        return self._send(handler, 404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _file(self, handler: Any, name: str, data: bytes, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.COMMIT}
        first, _, last = (handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)) + 1, len(data))
        if partial := "Range" in handler.headers:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        cut = self.cut_after.pop(name, None) if body else None
        stall = self.stall_after.pop(name, None) if body else None
        self._send(handler, 206 if partial else 200, data[start:end], body, headers, stall or cut)
        if stall:
            handler.wfile.flush()
            self.stalled.set()
            time.sleep(60)

    def _send(
        self, handler: Any, status: int, data: bytes, body: bool, headers: dict[str, str], cut: int | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if body:
            data = data[:cut]
            piece = self.pace // 10 or len(data) or 1
            for start in range(0, len(data), piece):
                handler.wfile.write(data[start : start + piece])
                time.sleep(0.1 if self.pace else 0)
        if cut is not None:
            handler.close_connection = True


def folder_content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


IMMICH_REPO = "immich-app/ViT-B-32__laion2b-s34b-b79k"
