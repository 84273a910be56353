"""A hub of one model on this machine, which keeps count of what is downloaded from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_model(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a model folder as the hub does.

    Args:
        folder: with the model's files.
        name: hub id, ``OWNER/NAME``.

    Yields:
        The address for ``HF_ENDPOINT``, and the names of the files that were downloaded, in order.
    """
    downloaded: list[str] = []
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{name}/revision/"):
                siblings = [{"rfilename": file} for file in files]
                content, kind = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), None
            elif path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": file}
                    for file in files
                ]
                content, kind = json.dumps(tree).encode(), None
            elif path.startswith(f"/{name}/resolve/") and (kind := path.split("/", 5)[5]) in files:
                content = (folder / kind).read_bytes()
            elif path.startswith(f"/{name}/resolve/"):
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            else:
                self.send_error(404)
                return
            self.send_response(200)
            if kind is not None:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if body:
                    downloaded.append(kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
