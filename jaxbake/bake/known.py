"""What the teacher says at each step of training and of the held-out examples: looked up, for it was asked before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bake import folder as layout
from jaxbake.bake.abstract import HIDDEN_AXES
from jaxbake.bake.asking import Asker, Part, fill
from jaxbake.bake.other import Other
from jaxbake.bake.targets import (
    Form,
    Table,
    columns,
    content_key,
    held_out_form,
    kept_form,
    open_table,
    where_to_keep,
)
from jaxbake.config import BakeConfig
from jaxbake.data.batches import Batch, Batches
from jaxbake.data.chat import Example
from jaxbake.files import AnyPath
from jaxbake.mesh import put
from jaxbake.models.base import Base
from jaxbake.models.cache import Prefix

Told = dict[str, Any]
"""What a step is told of the teacher, as keyword arguments: what is `known` of it (`objectives.SoftTargets`), or the
`prefix` behind which to ask it."""

HELD_OUT = "held_out"


@jax.jit
def take_rows(table: Any, source: jax.Array) -> Any:
    """The rows of hidden states, of `Moments` or of a `TopK`."""
    return jax.tree.map(lambda x: jnp.take(x, source, axis=0, mode="clip"), table)  # padding (-1) weighs nothing


class Known:
    """What the teacher says at matched tokens: `rows` in their order, on the device whole or as they are needed."""

    def __init__(self, base: Base, rows: np.ndarray, on_device: bool = False):
        self._mesh, self._on_device = base.mesh, on_device
        self._rows = jax.tree.map(jnp.asarray, columns(rows)) if on_device else rows

    def __call__(self, source: np.ndarray) -> Told:
        """For these tokens [B, K], as `Batch.source` counts them."""
        if self._on_device:
            said = take_rows(self._rows, source)
        else:
            said = jax.tree.map(self._put, columns(self._rows[np.maximum(source, 0)]))
        return {"known": said}

    def _put(self, x: np.ndarray) -> jax.Array:
        return put(x, HIDDEN_AXES[: x.ndim], self._mesh) if self._mesh else jnp.asarray(x)


class Teachers:
    """Who is asked about which example, and what is shared of the prompts.

    Another model is asked about all but pins: these say that nothing is to change, and their teacher is the base.
    """

    def __init__(self, base: Base, examples: Sequence[Example], batch_size: int, other: Other | None = None):
        self.base, self.examples, self.other = base, tuple(examples), other
        self._batch_size, self._asker, self._others = batch_size, Asker(base, examples, batch_size), None
        self._pins = np.array([e.kind == "pin" for e in examples])
        matched = np.array([int(e.mask.sum()) for e in examples])
        self._ends = np.cumsum(matched)
        self._starts = self._ends - matched

    @property
    def prompts(self) -> tuple[np.ndarray, ...]:
        return self._asker.prompts

    def prefix(self) -> Prefix | None:
        """The one prompt's keys and values."""
        return self._asker.prefix(0)

    def tokens(self, which: np.ndarray) -> np.ndarray:
        """The matched tokens of these examples, as all are counted."""
        return np.concatenate([np.arange(self._starts[i], self._ends[i]) for i in which])

    def layout(self, which: np.ndarray, form: Form) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a table for these examples' matched tokens."""
        return form.layout(self.tokens(which).size, self.base.config.hidden_size, self.base.params["norm"].dtype)

    def size(self, which: np.ndarray, form: Form) -> int:
        """Its bytes."""
        shape, dtype = self.layout(which, form)
        return math.prod(shape) * dtype.itemsize

    def part(self, rows: np.ndarray, form: Form, which: np.ndarray) -> Part:
        """Rows for the matched tokens of these examples, in order."""
        place = np.full(self._ends[-1], -1, np.int32)
        tokens = self.tokens(which)
        place[tokens] = np.arange(tokens.size)
        return Part(rows, form, place)

    def fill(self, which: np.ndarray, parts: Sequence[Part]) -> None:
        """Asks about these examples, and writes what is said into all parts that have a place for it."""
        if self.other is None:
            fill(self._asker, which, parts)
            return
        pins, others = which[self._pins[which]], which[~self._pins[which]]
        if pins.size:
            fill(self._asker, pins, parts)
        if others.size:
            if self._others is None:
                self._others = Asker(self.other.load(), self.examples, self._batch_size)
            fill(self._others, others, parts)

    def forget(self) -> None:
        """A prompt's keys and values are no longer needed."""
        self._others = None
        self._asker.forget()

    def let_go(self) -> None:
        """Nor are the other model's weights."""
        self.forget()
        if self.other is not None:
            self.other.let_go()


class _Windows:
    """What the teacher says, asked for a number of steps at a time, as many as there is room for.

    A window's examples are asked about together, prompt by prompt, so that a batch may mix as many prompts as it likes.
    Windows begin at the same steps whenever a bake is resumed.
    """

    def __init__(self, teachers: Teachers, batches: Batches, form: Form, steps: int, length: int):
        self._teachers, self._batches, self._form = teachers, batches, form
        self._steps, self._length = steps, length
        self._at, self._known, self._place = -1, None, None

    def __call__(self, n: int, batch: Batch) -> Told:
        if n // self._length != self._at:
            self._at, self._known = n // self._length, None
            steps = range(self._at * self._length, min((self._at + 1) * self._length, self._steps))
            which = np.unique(np.concatenate([self._batches.chosen(step) for step in steps]))
            teachers = self._teachers
            part = teachers.part(np.zeros(*teachers.layout(which, self._form)), self._form, which)
            teachers.fill(which, [part])
            self._known, self._place = Known(teachers.base, part.rows), part.place
        return self._known(np.where(batch.source >= 0, self._place[np.maximum(batch.source, 0)], -1))


def teach(
    teachers: Teachers, config: BakeConfig, batches: Batches, folder: AnyPath | None
) -> tuple[Callable[[int, Batch], Told], Known]:
    """(told, held_out): what the step of a batch is told of the teacher, and what is known of the held-out examples.

    teachers: of the examples of `batches`, and the held-out ones after them. Where examples are visited again, all is
    asked in one pass over the prompts and kept as the settings' budgets allow; from then on the student trains alone.
    Otherwise a single prompt's teacher is asked in the step, and that of several prompts some steps ahead. What another
    model says lies in a file of the output folder too, if there may be one, so that a resumed bake need not load it.
    """
    base, other, settings = teachers.base, teachers.other, config.train
    k = config.teacher.tokens_kept(other is not None)
    form = kept_form(config, base.config, base.params["norm"].dtype, other is not None)
    held_form = held_out_form(config, other is not None)
    train, held = np.split(np.arange(len(teachers.examples)), [len(batches.examples)])
    local = folder if jax.process_count() == 1 else None
    again = settings.steps * settings.batch_size > len(train)
    asked = config.loss.divergence != "cross_entropy"
    size = teachers.size(train, form)
    room = where_to_keep(size, settings, local) if asked and (again or other) else None
    on_disk = replace(settings, teacher_device_gb=0, teacher_host_gb=0)
    filed = room == "disk" or (room and other and where_to_keep(size, on_disk, local))

    kept = [(held, held_form, local / layout.TEACHER / HELD_OUT if filed else None)]
    if room:
        kept.append((train, form, local / layout.TEACHER if filed else None))
    held_table, *tables = keep_all(teachers, kept)
    held_known = Known(base, held_table.rows)
    if room or not asked:
        teachers.let_go()
    if not asked:
        return lambda n, batch: {}, held_known
    if room:
        rows = np.array(tables[0].rows) if filed and room == "host" else tables[0].rows
        known = Known(base, rows, on_device=room == "device" and base.mesh is None)
        return lambda n, batch: known(batch.source), held_known
    if other is None and k is None and len(teachers.prompts) == 1:
        prefix = teachers.prefix()
        return lambda n, batch: {"prefix": prefix}, held_known
    form = Form() if k is None else form  # visited once
    in_memory = settings.teacher_host_gb * 2**30 * len(train) / (size * settings.batch_size)
    return _Windows(teachers, batches, form, settings.steps, max(1, int(min(in_memory, settings.steps)))), held_known


def teacher_key(base: Base, other: Other | None, form: Form) -> str:
    """Who is asked, and what is kept of the answer."""
    return f"{base.digest} {other and other.digest} {form}"


def keep_all(teachers: Teachers, kept: Sequence[tuple[np.ndarray, Form, Path | None]]) -> list[Table]:
    """What the teachers say of examples, in a form: a table of each kind, in memory or in a folder's file.

    If any of them is not there yet, all are asked about, in the rows that are always the same: so a resumed bake is
    bitwise the same.
    """
    tables = [_table(teachers, *one) for one in kept]
    found = zip(tables, kept, strict=True)
    parts = [teachers.part(table.rows, form, which) for table, (which, form, _) in found if not table.complete]
    if parts:
        teachers.fill(np.sort(np.concatenate([which for which, _, _ in kept])), parts)
    for table in tables:
        table.finish()
    return tables


def _table(teachers: Teachers, which: np.ndarray, form: Form, folder: Path | None) -> Table:
    shape, dtype = teachers.layout(which, form)
    key = ""
    if folder is not None:
        key = content_key(teacher_key(teachers.base, teachers.other, form), teachers.examples, teachers.prompts)
    return open_table(shape, dtype, folder, key)
