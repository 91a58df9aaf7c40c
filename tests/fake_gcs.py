"""A Google Cloud Storage of our own: objects in a dictionary, seen through fsspec (by etils.epath), through HTTP (by
TensorStore), and through the client library's few calls that Orbax makes.

As in the real one an object appears whole or not at all, there are no folders, and nothing can be renamed.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import types
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

OBJECTS: dict[str, tuple[bytes, int]] = {}
"""By "bucket/name": content and generation."""

_lock = threading.Lock()


def put(name: str, content: bytes) -> int:
    with _lock:
        generation = OBJECTS.get(name, (b"", 0))[1] + 1
        OBJECTS[name] = content, generation
    return generation


class FileSystem(AbstractFileSystem):
    """What gcsfs is to fsspec."""

    protocol = ("gcs", "gs")
    cachable = False

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            found = {path: "file"}
        else:
            inside = [name[len(path) + 1 :] for name in list(OBJECTS) if name.startswith(f"{path}/")]
            found = {f"{path}/{n.split('/')[0]}": "directory" if "/" in n else "file" for n in sorted(inside)}
            if not found:
                raise FileNotFoundError(path)
        entries = [{"name": n, "type": t, "size": len(OBJECTS[n][0]) if n in OBJECTS else 0} for n, t in found.items()]
        return entries if detail else list(found)

    def info(self, path, **_):
        path = self._strip_protocol(path).rstrip("/")
        if path in OBJECTS:
            return {"name": path, "type": "file", "size": len(OBJECTS[path][0])}
        if any(name.startswith(f"{path}/") for name in list(OBJECTS)) or "/" not in path:
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path][0])
        assert mode == "wb", f"objects cannot be opened with {mode}"
        return _Upload(path)

    def mkdir(self, path, create_parents=True, **_):
        """There are no folders."""

    def makedirs(self, path, exist_ok=False):
        """There are no folders."""

    def rmdir(self, path):
        """There are no folders."""

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path).rstrip("/")
        inside = [name for name in list(OBJECTS) if name == path or (recursive and name.startswith(f"{path}/"))]
        if not inside:
            raise FileNotFoundError(path)
        for name in inside:
            OBJECTS.pop(name, None)

    def mv(self, path1, path2, **_):
        raise AssertionError(f"{path1}: an object store renames nothing")


class _Upload(io.BytesIO):
    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def close(self) -> None:
        if not self.closed:
            put(self._name, self.getvalue())
        super().close()


class _Handler(BaseHTTPRequestHandler):
    """The parts of the JSON API that TensorStore speaks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent."""

    def _reply(self, code: int, content: bytes = b"", generation: int | None = None, kind="application/json"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(content)

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}

    def _object(self, path: str) -> str:
        bucket, _, name = path.partition("/b/")[2].partition("/o/")
        return f"{bucket}/{unquote(name)}"

    def do_GET(self):
        path, query = self._asked()
        if path.endswith("/o"):
            bucket, prefix = path.split("/b/")[1][:-2], query.get("prefix", "")
            start, end = query.get("startOffset", ""), query.get("endOffset")
            names = sorted(name.partition("/")[2] for name in list(OBJECTS) if name.startswith(f"{bucket}/{prefix}"))
            names = [name for name in names if name >= start and (end is None or name < end)]
            items = [{"name": n, "size": str(len(OBJECTS[f"{bucket}/{n}"][0]))} for n in names]
            return self._reply(200, json.dumps({"items": items}).encode())
        content, generation = OBJECTS.get(self._object(path), (None, 0))
        if content is None:
            return self._reply(404)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._reply(304, generation=generation)
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            whole, first = len(content), int(first)
            content = content[first : int(last) + 1 if last else whole]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{whole}")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", str(generation))
            self.end_headers()
            self.wfile.write(content)
            return None
        return self._reply(200, content, generation, "application/octet-stream")

    def do_POST(self):
        path, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{path.split('/b/')[1].removesuffix('/o')}/{query['name']}"
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != OBJECTS.get(name, (b"", 0))[1]:
            return self._reply(412)
        generation = put(name, content)
        told = {"name": query["name"], "generation": str(generation), "size": str(len(content))}
        return self._reply(200, json.dumps(told).encode())

    def do_DELETE(self):
        path, _ = self._asked()
        self._reply(204 if OBJECTS.pop(self._object(path), None) else 404)


class _Bucket:
    """google.cloud.storage.Bucket, as far as Orbax looks."""

    hierarchical_namespace_enabled = False

    def __init__(self, name: str):
        self.name = name

    def list_blobs(self, prefix="", delimiter=None, **_):
        inside = [name[len(self.name) + 1 :] for name in list(OBJECTS) if name.startswith(f"{self.name}/{prefix}")]
        folders = {prefix + n[len(prefix) :].split("/")[0] + "/" for n in inside if "/" in n[len(prefix) :]}
        blobs = [types.SimpleNamespace(name=n) for n in inside if delimiter is None or "/" not in n[len(prefix) :]]

        class Found(list):
            prefixes = folders
            pages = property(lambda self: [self])

        return Found(blobs)


@contextmanager
def running(monkeypatch):
    """gs:// means these objects, for the time of the block."""
    server = ThreadingHTTPServer(("localhost", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=_Bucket)
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    for name in FileSystem.protocol:
        monkeypatch.setitem(_registry, name, FileSystem)
    try:
        yield OBJECTS
    finally:
        server.shutdown()
        thread.join()
        OBJECTS.clear()
