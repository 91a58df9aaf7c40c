"""Writing whole or not at all, and reading JSON with an error a person can act on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxbake.errors import JaxbakeError


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` only once the block has ended well.

    An earlier folder is replaced only if all its entries are written anew; so other people's files are never lost.
    Raises JaxbakeError where it cannot be written, or where `folder` holds something else.
    """
    folder = Path(os.path.abspath(folder))
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        if folder.exists():
            others = sorted(set(os.listdir(folder)) - set(os.listdir(work)))
            if others:
                raise JaxbakeError(
                    f"{folder}: holds other files ({', '.join(others[:5])}); give an empty or new folder"
                )
            os.rename(folder, aside)
        os.rename(work, folder)
    except OSError as error:
        raise JaxbakeError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            os.rename(aside, folder)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises JaxbakeError where it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JaxbakeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise JaxbakeError(f"{path}: is damaged, not JSON: {error}") from error
    if not isinstance(value, dict):
        raise JaxbakeError(f"{path}: must hold one JSON object, holds a {type(value).__name__}")
    return value


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) beside its final name, then renames it: readers see the old or the new one, whole.

    Raises JaxbakeError where it cannot be written (permission, space, a folder in the way).
    """
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(work, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except OSError as error:
        raise JaxbakeError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)
