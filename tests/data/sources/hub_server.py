"""A Hub of our own on this machine: as much of its protocol as `datasets` asks for, over files in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


def commit_of(files: Files) -> str:
    """A commit is named by what it holds."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def hub(revisions: Mapping[tuple[str, str], Files], gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """Serves datasets while it is open.

    Args:
        revisions: (id, revision) to files.
        gated: ids whose files nobody may read.

    Yields:
        Its address, for HF_ENDPOINT.
    """

    class Handler(_Handler):
        served = revisions
        refused = gated

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Mapping[tuple[str, str], Files]
    refused: frozenset[str]

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "datasets" and "resolve" in parts:
            at = parts.index("resolve")
            self._file("/".join(parts[1:at]), parts[at + 1 :])
        else:
            self._answer(404, b"")

    do_HEAD = do_GET  # noqa: N815 - the name that the base class looks for

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        hub_id, (kind, *rest) = "/".join(parts[2:4]), parts[4:]
        found = self._find(hub_id, rest)
        if kind != "paths-info" or found is None:
            return self._missing(hub_id)
        wanted = json.loads(body)["paths"]
        return self._json([entry for entry in _entries(found[0], "") if entry["path"] in wanted])

    def _api(self, hub_id: str, parts: list[str]) -> None:
        kind, rest = (parts[0], parts[1:]) if parts else ("revision", ["main"])
        found = self._find(hub_id, rest)
        if found is None:
            return self._missing(hub_id)
        files, below = found
        if kind == "tree":
            return self._json(_entries(files, "/".join(below)))
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": hub_id, "sha": commit_of(files), "siblings": siblings, "private": False, "tags": []})

    def _file(self, hub_id: str, parts: list[str]) -> None:
        found = self._find(hub_id, parts)
        if found is None:
            return self._missing(hub_id)
        if hub_id in self.refused:
            return self._answer(401, b"", {"X-Error-Code": "GatedRepo"})
        files, below = found
        name = "/".join(below)
        commit = {"X-Repo-Commit": commit_of(files)}
        if name not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        return self._answer(200, files[name], {"ETag": f'"{_oid(files[name])}"', **commit})

    def _find(self, hub_id: str, parts: list[str]) -> tuple[Files, list[str]] | None:
        """Files of the revision that a path begins with, which may have slashes itself, and what follows it."""
        for length in range(1, len(parts) + 1):
            revision = "/".join(parts[:length])
            for (known, name), files in self.served.items():
                if known == hub_id and revision in (name, commit_of(files)):
                    return files, parts[length:]
        return None

    def _missing(self, hub_id: str) -> None:
        exists = any(known == hub_id for known, _ in self.served)
        self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if exists else "RepoNotFound"})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        first, last = 0, len(content) - 1
        wanted = self.headers.get("Range")
        if status == 200 and wanted is not None:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            status = 206
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the console."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entries(files: Files, below: str) -> list[dict[str, object]]:
    """Files and directories, in the form of the Hub's list of a tree, all the way down."""
    prefix = f"{below}/" if below else ""
    inside = [name for name in files if name.startswith(prefix)]
    folders = {"/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)}
    return [
        *({"type": "directory", "path": path, "oid": "0", "size": 0} for path in sorted(folders - {below})),
        *({"type": "file", "path": name, "oid": _oid(files[name]), "size": len(files[name])} for name in inside),
    ]
