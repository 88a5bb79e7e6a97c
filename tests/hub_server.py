"""A Hugging Face hub with one repository, as far as snapshot_download needs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A repository and what was asked of it.

    Args:
        repository: Its name, with its owner.
        files: Content by name.
        url: Of the hub.
        requests: Method and path of every request so far.
        broken_after: Bytes of a file after which connections break; None for never.
    """

    repository: str
    files: dict[str, bytes]
    url: str = ""
    commit: str = COMMIT
    requests: list[str] = field(default_factory=list)
    broken_after: int | None = None

    def downloads(self) -> list[str]:
        """The files that were sent, in order."""
        return [r.rpartition("/")[2] for r in self.requests if r.startswith("GET /Open")]


@contextlib.contextmanager
def serving(repository: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """Serves the repository at a free port of this machine until the context ends."""
    hub = Hub(repository, files)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.served, urlsplit(self.path).path
        hub.requests.append(f"{self.command} {path}")
        file = path.removeprefix(f"/{hub.repository}/resolve/{hub.commit}/")
        if path == f"/api/models/{hub.repository}/revision/main":
            names = [{"rfilename": name} for name in hub.files]
            self._send_json({"id": hub.repository, "sha": hub.commit, "siblings": names})
        elif path == f"/api/models/{hub.repository}/tree/{hub.commit}":
            self._send_json(
                [
                    {"type": "file", "path": n, "size": len(data), "oid": _etag(data)}
                    for n, data in hub.files.items()
                ]
            )
        elif file in hub.files:
            data = hub.files[file]
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": hub.commit}
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._send(206 if first else 200, data[first:], headers)
        else:
            code = "EntryNotFound" if hub.repository in path else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": code})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[: self.served.broken_after])

    def log_message(self, format: str, *args: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
