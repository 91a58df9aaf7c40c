"""What the teacher says, computed once and kept where there is room: on the device, in memory, or in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxbake.config import BakeConfig, TrainConfig
from jaxbake.data.chat import Example
from jaxbake.files import AnyPath, is_remote, write_whole
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import Moments, TopK

FILE, NOTE = "teacher.bin", "teacher.json"
ROOMS = ("device", "host", "disk")


@dataclass(frozen=True)
class Form:
    """What is kept of a teacher at a token: its final hidden state, or, at a temperature, the `objectives.Moments` of
    its distribution or its `top_k` most likely tokens and the others' mass (`objectives.TopK`)."""

    top_k: int | None = None
    moments: bool = False
    temperature: float = 1.0

    def layout(self, tokens: int, width: int, dtype: Any) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a table of so many tokens: [tokens, D] of `dtype`, or [tokens] of records in float32,
        whatever the model's own dtype is."""
        if self.moments:
            return (tokens,), np.dtype([("mean", np.float32, (width,)), ("entropy", np.float32)])
        if self.top_k is None:
            return (tokens, width), np.dtype(dtype)
        k = (self.top_k,)
        return (tokens,), np.dtype([("ids", np.int32, k), ("log_probs", np.float32, k), ("log_tail", np.float32)])


_MADE = {kind._fields: kind for kind in (TopK, Moments)}

MOMENTS_FROM = 4096
"""Tokens of a vocabulary. With fewer, the product that moments spare is little beside the layers', and a gradient from
hidden states has a few more digits."""


def kept_form(config: BakeConfig, model: ModelConfig, dtype: Any, other: bool = False) -> Form:
    """What is kept of a teacher whose tokens are visited again: its moments where they say all that the loss asks, with
    fewer products at every visit; else what the settings say. Who names an implementation of the loss gets that one,
    which takes hidden states. other: another model than the student's."""
    k = config.teacher.tokens_kept(other)
    if k is not None:
        return Form(top_k=k, temperature=config.loss.temperature)
    loss = config.loss
    enough = loss.divergence == "forward" and model.logit_softcap is None and np.dtype(dtype) == np.float32
    wanted = loss.implementation == "auto" and model.vocab_size >= MOMENTS_FROM
    return Form(moments=True, temperature=loss.temperature) if enough and wanted else Form()


def held_out_form(config: BakeConfig, other: bool) -> Form:
    """Of a teacher at held-out tokens: its hidden states; of another model than the student's, its top k."""
    return Form(top_k=config.teacher.tokens_kept(other)) if other else Form()


def columns(rows: np.ndarray) -> Any:
    """A table's rows as an objective takes them: hidden states, `Moments` or a `TopK`."""
    return rows if rows.dtype.names is None else _MADE[rows.dtype.names](*(rows[name] for name in rows.dtype.names))


def write_rows(rows: np.ndarray, at: np.ndarray, said: Any) -> None:
    """Puts hidden states, `Moments` or a `TopK` into these rows of a table."""
    if rows.dtype.names is None:
        rows[at] = said
        return
    for name, values in zip(rows.dtype.names, said, strict=True):
        rows[name][at] = values


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


def content_key(teacher: str, examples: Iterable[Example], prompts: Sequence[np.ndarray]) -> str:
    """What the teacher says depends on: the teacher (digests, form), tokens, and how they are split into prefix and
    row."""
    digest = hashlib.sha256(teacher.encode())
    parts = ((e.teacher_prefix, e.tail, e.mask, np.int32([e.prompt, e.kind == "pin"])) for e in examples)
    for ids in (*prompts, *(part for group in parts for part in group)):
        array = np.ascontiguousarray(ids)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass
class Table:
    """Rows for the matched tokens of examples, written once. complete: they are those of an earlier run already."""

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


def open_table(shape: tuple[int, ...], dtype: np.dtype, folder: Path | None, key: str) -> Table:
    """A table in memory, or where a folder is given in a file of it, mapped into memory.

    A finished file with the same key is taken as it is; any other is written anew.
    """
    dtype = np.dtype(dtype)
    if folder is None:
        return Table(np.zeros(shape, dtype))
    said = {"key": key, "shape": list(shape), "dtype": dtype.name if dtype.names is None else str(dtype.descr)}
    note = json.dumps(said, indent=2) + "\n"
    path, beside = folder / FILE, folder / NOTE
    size = math.prod(shape) * dtype.itemsize
    if beside.is_file() and beside.read_text("utf-8") == note and path.is_file() and path.stat().st_size == size:
        return Table(np.memmap(path, dtype, "r", shape=shape), complete=True)
    folder.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    return Table(np.memmap(folder / f"{FILE}.partial", dtype, "w+", shape=shape), False, folder, note)
