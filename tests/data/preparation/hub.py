"""A Hugging Face hub on loopback: as much of its API as datasets are streamed with, over a folder of repositories.

The folder holds OWNER/NAME/..., each a dataset repository with one revision, `main`. What the hub answers where:

    GET /api/datasets/OWNER/NAME[/revision/REV]         the revision's commit
    GET /api/datasets/OWNER/NAME/tree/REV[/PATH]        files and folders below a path
    GET, HEAD /datasets/OWNER/NAME/resolve/REV/PATH     a file's bytes, or a range of them
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<verb>revision|tree)/(?P<rev>[^/]+))?(/(?P<path>.*))?")
RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


class Hub(ThreadingHTTPServer):
    """A server of the repositories in a folder, which counts the bytes of each file it sends."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.bytes_sent: dict[str, int] = {}  # of each file's content, by its path under the folder

    @staticmethod
    def commit(repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run a hub of the repositories under `folder` until the block ends."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, *arguments: object) -> None:
        """Nothing: a test's output is its own."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := API.fullmatch(path):
            self._answer_about(**match.groupdict())
        elif match := RESOLVE.fullmatch(path):
            self._send_file(**match.groupdict())
        else:
            self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _answer_about(self, repo: str, verb: str | None, rev: str | None, path: str | None) -> None:
        if not self._found(repo, rev or "main"):
            return
        root = self.hub.folder / repo
        if verb == "tree":
            query = parse_qs(urlsplit(self.path).query)
            below = root / (path or "")
            if not below.is_dir():
                self._refuse("EntryNotFound")
                return
            pattern = "**/*" if query.get("recursive", ["false"])[0].lower() == "true" else "*"
            self._send_json([described(found, root) for found in sorted(below.glob(pattern))])
        else:
            self._send_json({"id": repo, "sha": self.hub.commit(repo), "private": False, "tags": [], "siblings": []})

    def _send_file(self, repo: str, rev: str, path: str) -> None:
        if not self._found(repo, rev):
            return
        file = self.hub.folder / repo / path
        if not file.is_file():
            self._refuse("EntryNotFound")
            return
        content, status, headers = file.read_bytes(), HTTPStatus.OK, {"ETag": f'"{oid(file)}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
            status, headers["Content-Range"] = HTTPStatus.PARTIAL_CONTENT, f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        if self.command == "GET":
            name = f"{repo}/{path}"
            self.hub.bytes_sent[name] = self.hub.bytes_sent.get(name, 0) + len(content)
        self._send(status, content, {**headers, "Accept-Ranges": "bytes", "X-Repo-Commit": self.hub.commit(repo)})

    def _found(self, repo: str, rev: str) -> bool:
        if not (self.hub.folder / repo).is_dir():
            self._refuse("RepoNotFound")
        elif rev not in ("main", self.hub.commit(repo)):
            self._refuse("RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, code: str) -> None:
        self._send(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": code})

    def _send_json(self, content: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def described(path: Path, root: Path) -> dict[str, object]:
    """A file or folder as the hub's lists hold it."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    return {"type": "file", "path": name, "oid": oid(path), "size": path.stat().st_size}


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
