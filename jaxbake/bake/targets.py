"""The teacher's hidden states, computed once and kept where there is room: on the device, in memory, or in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxbake.config import TrainConfig
from jaxbake.data.chat import Example
from jaxbake.files import AnyPath, is_remote, write_whole

FILE, NOTE = "teacher.bin", "teacher.json"


ROOMS = ("device", "host", "disk")


def where_to_keep(
    size: int, settings: TrainConfig, folder: AnyPath | None, taken: Mapping[str, int] | None = None
) -> str | None:
    """The first of `ROOMS` whose budget holds `size` bytes; None: compute them at each visit.

    A file needs a local folder to lie in. taken: bytes that other bakes of the same step keep in each already.
    """
    local = folder is not None and not is_remote(folder)
    budgets = (settings.teacher_device_gb, settings.teacher_host_gb, settings.teacher_disk_gb if local else 0)
    taken = taken or {}
    rooms = zip(ROOMS, budgets, strict=True)
    return next((room for room, gigabytes in rooms if size + taken.get(room, 0) <= gigabytes * 2**30), None)


def content_key(base_digest: str, examples: Iterable[Example], prefix_P: np.ndarray) -> str:
    """What the teacher's hidden states depend on: base, tokens, and how they are split into prefix and row."""
    digest = hashlib.sha256(base_digest.encode())
    for ids in (prefix_P, *(part for e in examples for part in (e.teacher_prefix, e.tail, e.mask))):
        array = np.ascontiguousarray(ids)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass
class Table:
    """Rows [matched tokens of all examples, D], written once. complete: they are those of an earlier run already."""

    rows: np.ndarray
    complete: bool = False
    _folder: Path | None = None
    _note: str = ""

    def finish(self) -> None:
        """All rows are written: from now on the file counts."""
        if self._folder is not None and not self.complete:
            self.rows.flush()
            os.replace(self._folder / f"{FILE}.partial", self._folder / FILE)
            write_whole(self._folder / NOTE, self._note)
        self.complete = True


def open_table(shape: tuple[int, int], dtype: np.dtype, folder: Path | None, key: str) -> Table:
    """A table in memory, or where a folder is given in a file of it, mapped into memory.

    A finished file with the same key is taken as it is; any other is written anew.
    """
    dtype = np.dtype(dtype)
    if folder is None:
        return Table(np.zeros(shape, dtype))
    note = json.dumps({"key": key, "shape": list(shape), "dtype": dtype.name}, indent=2) + "\n"
    path, beside = folder / FILE, folder / NOTE
    size = math.prod(shape) * dtype.itemsize
    if beside.is_file() and beside.read_text("utf-8") == note and path.is_file() and path.stat().st_size == size:
        return Table(np.memmap(path, dtype, "r", shape=shape), complete=True)
    folder.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    return Table(np.memmap(folder / f"{FILE}.partial", dtype, "w+", shape=shape), False, folder, note)
