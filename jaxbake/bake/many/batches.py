"""The rows of many bakes side by side: a step's batch, what the teachers say about it, and the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bake import folder as layout
from jaxbake.bake.abstract import HIDDEN_AXES, put_batch, put_view
from jaxbake.bake.asking import Asker, teacher_hidden_of
from jaxbake.bake.known import HELD_OUT, take_rows, teacher_key
from jaxbake.bake.targets import ROOMS, Form, Table, content_key, open_table, where_to_keep
from jaxbake.data.batches import Batch, Batches, View, alike
from jaxbake.mesh import parts, put
from jaxbake.models.base import Base
from jaxbake.models.decoder import Prefix


def padded(x: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
    """The array with rows of `fill` at its end."""
    return np.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """The members' batches as one of M * B rows, each filled up to the B of the longest; the student's view only."""
    rows = max(batch.weights.shape[0] for batch in batches)

    def join(parts: Sequence[np.ndarray], fill: int = 0) -> np.ndarray:
        return np.concatenate([padded(np.asarray(part), rows, fill) for part in parts])

    return Batch(
        student=View(*(join([getattr(b.student, name) for b in batches]) for name in View.__dataclass_fields__)),
        teacher=None,
        targets=join([b.targets for b in batches]),
        weights=join([b.weights for b in batches]),
        source=join([b.source for b in batches], -1),
    )


class Voices:
    """Each member's teacher, the base behind the member's prompts, and what it says of the held-out examples."""

    def __init__(self, base: Base, members: Sequence[Any]):
        self.examples = [[*member.examples, *member.held_out] for member in members]
        self._askers = [
            Asker(base, examples, member.config.train.batch_size)
            for member, examples in zip(members, self.examples, strict=True)
        ]
        self._matched = [sum(int(example.mask.sum()) for example in member.examples) for member in members]
        self._first_held_out = [len(member.examples) for member in members]
        self._held_out: dict[int, np.ndarray] = {}

    @property
    def prompts(self) -> list[tuple[np.ndarray, ...]]:
        """What each member's rows begin with."""
        return [asker.prompts for asker in self._askers]

    def prefix(self, i: int) -> Prefix | None:
        """The keys and values of member i's prompt."""
        return self._askers[i].prefix(0)

    def hidden(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """What member i's teacher says of its training examples [matched, D] and of the held-out ones, asked about
        together, in the rows that a bake alone has."""
        said = self._askers[i].hidden()
        self._askers[i].forget()
        return said[: self._matched[i]], said[self._matched[i] :]

    def keep(self, i: int, held_out: np.ndarray) -> None:
        """What it says of the held-out ones is known."""
        self._held_out[i] = held_out

    def held_out(self, i: int) -> np.ndarray:
        """What it says of the held-out ones; asked about them alone where it was not kept."""
        if i not in self._held_out:
            which = np.arange(self._first_held_out[i], len(self.examples[i]))
            self._held_out[i] = self._askers[i].hidden(which)[self._matched[i] :]
        return self._held_out[i]


def _batches(
    base: Base, members: Sequence[Any], examples: Sequence[Sequence[Any]], voices: Voices, accumulate: int = 1
) -> list[Batches]:
    """Each member's examples as batches of its own, in rows of the same lengths; every device has as many of them."""
    multiples = {"rows_multiple": accumulate * parts("batch", base.mesh), "tokens_multiple": parts("seq", base.mesh)}
    own = []
    for member, one, prompts in zip(members, examples, voices.prompts, strict=True):
        train = member.config.train
        sizes = {"batch_size": train.batch_size, "max_length": train.max_length, "seed": member.config.seed}
        own.append(Batches(one, prompts, **sizes, **multiples))
    return alike(own)


class Rows:
    """The training rows of all members, and their teachers' hidden states at the matched tokens.

    What a teacher says is computed before the first step and kept where there is room, as for a bake alone
    (`targets.where_to_keep`); the members fill each room in order. For those that have none, teachers are asked at
    every step.
    """

    def __init__(self, base: Base, members: Sequence[Any], accumulate: int):
        self._base, self.voices = base, Voices(base, members)
        self._members = _batches(base, members, [m.examples for m in members], self.voices, accumulate)
        self._asked = members[0].config.loss.divergence != "cross_entropy"
        self._kept: dict[int, np.ndarray] = {}
        """By member, its table in memory or in a file."""
        self._starts: dict[int, int] = {}
        """By member, where its table begins in the one on the device."""
        self._on_device: jax.Array | None = None
        if self._asked:
            self._ask_once(members)

    def _ask_once(self, members: Sequence[Any]) -> None:
        taken, on_device = dict.fromkeys(ROOMS, 0), {}
        for i, member in enumerate(members):
            found = self._tables(i, member, taken)
            if found is None:
                continue
            room, tables = found
            if not all(table.complete for table in tables):
                for table, said in zip(tables, self.voices.hidden(i), strict=True):
                    if not table.complete:
                        table.rows[:] = said
            for table in tables:
                table.finish()
            table, held_out = tables
            self.voices.keep(i, held_out.rows)
            taken[room] += table.rows.nbytes
            # On a mesh each device is given what its rows need.
            (on_device if room == "device" and self._base.mesh is None else self._kept)[i] = table.rows
        if on_device:
            ends = np.cumsum([rows.shape[0] for rows in on_device.values()])
            self._starts = {i: int(e) - on_device[i].shape[0] for i, e in zip(on_device, ends, strict=True)}
            self._on_device = jnp.asarray(np.concatenate(list(on_device.values())))

    def _tables(self, i: int, member: Any, taken: dict[str, int]) -> tuple[str, tuple[Table, Table]] | None:
        """The room for what member i's teacher says, and where to write it there: of the training examples, and of the
        held-out ones. None where it is not kept."""
        train, examples = member.config.train, member.examples
        width, dtype = self._base.config.hidden_size, self._base.params["norm"].dtype
        sizes = [sum(int(e.mask.sum()) for e in some) for some in (examples, member.held_out)]
        room = where_to_keep(sizes[0] * width * dtype.itemsize, train, member.folder, taken)
        if room is None or train.steps * train.batch_size <= len(examples):  # each example is visited once at most
            return None
        folder = member.folder / layout.TEACHER if room == "disk" else None
        who = teacher_key(self._base, None, Form())
        key = content_key(who, self.voices.examples[i], self.voices.prompts[i])
        first, second = (
            open_table((size, width), dtype, where, key)
            for size, where in zip(sizes, (folder, folder and folder / HELD_OUT), strict=True)
        )
        return room, (first, second)

    def useful_fraction(self, i: int) -> float:
        """Share of a member's row tokens that are no padding."""
        return self._members[i].useful_fraction()

    def batch(self, n: int, places: Sequence[int]) -> Batch:
        """The rows of step n, of these members in order."""
        return side_by_side([self._members[i].batch(n) for i in places])

    def teacher(self, n: int, places: Sequence[int], batch: Batch) -> jax.Array | None:
        """The teachers' hidden states [M * B, K, D] for that batch."""
        if not self._asked:
            return None
        mesh = self._base.mesh
        source = np.maximum(batch.source, 0).reshape(len(places), -1, batch.source.shape[1])  # padding takes any row
        if all(i in self._starts for i in places):
            offset = np.array([self._starts[i] for i in places], np.int32)[:, None, None]
            return take_rows(self._on_device, (source + offset).reshape(batch.source.shape))
        said = [self._said(n, i, source[place]) for place, i in enumerate(places)]
        if all(isinstance(rows, np.ndarray) for rows in said):
            said = [np.concatenate(said)]
        return jnp.concatenate([put(x, HIDDEN_AXES, mesh) if isinstance(x, np.ndarray) else x for x in said])

    def _said(self, n: int, i: int, source_BK: np.ndarray) -> np.ndarray | jax.Array:
        """What member i's teacher says of its rows of step n."""
        if i in self._starts:
            return take_rows(self._on_device, source_BK + self._starts[i])
        if i in self._kept:
            return self._kept[i][source_BK]
        view = jax.tree.map(lambda x: padded(x, len(source_BK)), self._members[i].batch(n).teacher)
        return teacher_hidden_of(
            self._base.params, put_view(view, self._base.mesh), self.voices.prefix(i), self._base.config
        )


class Evaluation:
    """All members' held-out examples, in batches of which each member has some rows; the teachers are asked once."""

    def __init__(self, base: Base, members: Sequence[Any], voices: Voices):
        own = _batches(base, members, [m.held_out for m in members], voices)
        self._mesh = base.mesh
        self._parts: list[list[tuple[Batch, jax.Array]]] = []
        for i, batches in enumerate(own):
            said = voices.held_out(i)
            found = []
            for batch in batches.all():
                found.append((batch, put(said[np.maximum(batch.source, 0)], HIDDEN_AXES, base.mesh)))
            self._parts.append(found)
        self._joined: dict[tuple[int, ...], list[tuple[Batch, jax.Array]]] = {}

    def _batches(self, places: Sequence[int]) -> list[tuple[Batch, jax.Array]]:
        if tuple(places) not in self._joined:
            self._joined.clear()
            joined = []
            for k in range(max(len(self._parts[i]) for i in places)):
                # a member that has no more batches stands in with an empty one
                parts = [self._parts[i][k] if k < len(self._parts[i]) else _nothing(self._parts[i][0]) for i in places]
                batch = side_by_side([batch for batch, _ in parts])
                rows = batch.weights.shape[0] // len(places)
                pad = [jnp.pad(h, [(0, rows - h.shape[0]), (0, 0), (0, 0)]) for _, h in parts]
                joined.append((put_batch(batch, self._mesh), jnp.concatenate(pad)))
            self._joined[tuple(places)] = joined
        return self._joined[tuple(places)]

    def __call__(
        self, evaluate: Callable[..., tuple[jax.Array, ...]], delta: Any, params: Any, places: Sequence[int]
    ) -> dict[int, dict[str, float]]:
        """Held-out KL and agreement of each of these members."""
        sums = [evaluate(delta, params, batch, hidden) for batch, hidden in self._batches(places)]
        kl, count, agreement = (
            np.sum([np.asarray(x, np.float64) for x in column], axis=0) for column in zip(*sums, strict=True)
        )
        return {
            i: {"held_out_kl": float(kl[m] / count[m]), "held_out_agreement": float(agreement[m] / count[m])}
            for m, i in enumerate(places)
        }


def _nothing(part: tuple[Batch, jax.Array]) -> tuple[Batch, jax.Array]:
    """A batch of the same form that weighs nothing."""
    batch, hidden = part
    return batch.replace(weights=np.zeros_like(batch.weights)), hidden
