"""Paths that are local or in an object store, writing whole or not at all, and reading JSON with a plain error.

A path is a `pathlib.Path`, or for "gs://bucket/..." (s3, az, hf) an `etils.epath.Path`, which has the same methods and
reaches the store through fsspec; `as_path` chooses. How wholeness is kept:

- Locally a file or folder is written under another name, synced, and renamed, which is atomic.
- An object store shows an object only once it is wholly uploaded, but renames nothing: a folder is written locally
  first, then uploaded with its marker last (the file without which nobody reads the folder). What came before is
  removed marker first.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxbake.errors import JaxbakeError

STORES = {"gs": "jaxbake[gcs]", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
"""Object stores by the scheme of their paths, and what has to be installed to reach them."""

AnyPath = Any
"""`pathlib.Path` or `etils.epath.Path`."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names an object store."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike) -> AnyPath:
    """The path as an object with pathlib's methods, wherever it lies.

    Raises JaxbakeError for a store that is not known, or whose client is not installed.
    """
    if not is_remote(path):
        return Path(path)
    import fsspec
    from etils import epath

    scheme = os.fspath(path).split("://")[0]
    if scheme not in STORES:
        raise JaxbakeError(f"{path}: '{scheme}://' is no known store; paths are local, or gs://bucket/...")
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise JaxbakeError(f"{path}: needs a client; pip install '{STORES[scheme]}' ({error})") from None
    return epath.Path(os.fspath(path))


def absolute(path: str | os.PathLike) -> AnyPath:
    """The same without `..` and whatever else depends on the working directory."""
    return as_path(path) if is_remote(path) else Path(os.path.abspath(path))


def _faults(path: AnyPath) -> type[Exception]:
    """What reading or writing raises: a store's client has errors of its own."""
    return Exception if is_remote(path) else OSError


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def whole_folder(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """A local folder to write into that takes the name `folder` only once the block has ended well.

    last: the file that in an object store is uploaded last; readers take a folder without it for none.
    An earlier folder is replaced only if all its entries are written anew; so other people's files are never lost.
    Raises JaxbakeError where it cannot be written, or where `folder` holds something else.
    """
    folder = absolute(folder)
    try:
        with _uploaded(folder, last) if is_remote(folder) else _renamed(folder) as work:
            yield work
    except JaxbakeError:
        raise
    except _faults(folder) as error:
        raise JaxbakeError(f"{folder}: cannot be written: {_said(error)}") from error


@contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        if folder.exists():
            _only_ours(folder, work)
            os.rename(folder, aside)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            os.rename(aside, folder)


@contextmanager
def _uploaded(folder: AnyPath, last: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / folder.name
        work.mkdir()
        yield work
        if folder.exists():
            _only_ours(folder, work)
            (folder / last).unlink(missing_ok=True)
            folder.rmtree()
        files = [path.relative_to(work) for path in sorted(work.rglob("*")) if path.is_file()]
        for file in sorted(files, key=lambda file: file == Path(last)):
            upload(work / file, folder / file.as_posix())


def _only_ours(folder: AnyPath, work: Path) -> None:
    others = sorted({path.name for path in folder.iterdir()} - {path.name for path in work.iterdir()})
    if others:
        raise JaxbakeError(f"{folder}: holds other files ({', '.join(others[:5])}); give an empty or new folder")


def upload(source: Path, target: AnyPath) -> None:
    """Copies a local file into an object store, piece by piece."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, 1 << 24)


@contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """A file or folder as a local one: itself, or copied from its object store for the time of the block."""
    path = as_path(path)
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield _download(path, Path(scratch) / path.name)


def _download(source: AnyPath, target: Path) -> Path:
    if source.is_dir():
        target.mkdir()
        for part in source.iterdir():
            _download(part, target / part.name)
    else:
        with source.open("rb") as file, open(target, "wb") as out:
            shutil.copyfileobj(file, out, 1 << 24)
    return target


def read_json(path: AnyPath) -> dict:
    """The object in a JSON file. Raises JaxbakeError where it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JaxbakeError(f"{path}: is damaged, not JSON: {error}") from error
    except _faults(path) as error:
        raise JaxbakeError(f"{path}: cannot be read: {_said(error)}") from error
    if not isinstance(value, dict):
        raise JaxbakeError(f"{path}: must hold one JSON object, holds a {type(value).__name__}")
    return value


def write_whole(path: AnyPath, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) so that readers see the old or the new one, whole.

    Raises JaxbakeError where it cannot be written (permission, space, a folder in the way).
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            path.write_bytes(content)
        else:
            _replace(path, content)
    except _faults(path) as error:
        raise JaxbakeError(f"{path}: cannot be written: {_said(error)}") from error


def _replace(path: Path, content: bytes) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(work, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)
