"""The rows of many bakes side by side: a step's batch, what the teachers say about it, and the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.abstract import HIDDEN_AXES, put_batch, put_view
from jaxbake.bake.asking import in_form, teacher_hidden_of
from jaxbake.bake.known import HELD_OUT, Teachers, keep_all, take_rows
from jaxbake.bake.targets import ROOMS, columns, held_out_form, kept_form, where_to_keep
from jaxbake.data.batches import Batch, Batches, View, alike
from jaxbake.errors import JaxbakeError
from jaxbake.mesh import parts, put
from jaxbake.models.base import Base
from jaxbake.objectives import SoftTargets


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


class Rows:
    """The training rows of all members, and what their teachers, the base behind each one's prompts, say of them.

    What a teacher says is asked before the first step and kept where there is room, as for a bake alone
    (`targets.where_to_keep`), in the same form; the members fill each room in order. For those that have none, the
    teacher is asked at every step; another model than the base, and the base behind several prompts, must have room.
    """

    def __init__(self, base: Base, members: Sequence[Any], accumulate: int):
        self._base, self._members = base, members
        self._teachers = [
            Teachers(base, [*m.examples, *m.held_out], m.config.train.batch_size, m.other) for m in members
        ]
        self._held_out: dict[int, np.ndarray] = {}
        self._batches = self.batches([m.examples for m in members], accumulate)
        config = members[0].config  # all have the same loss
        self._asked = config.loss.divergence != "cross_entropy"
        other = members[0].other
        self._form = kept_form(config, base.config, base.params["norm"].dtype, other is not None)
        self._held_form = held_out_form(config, other is not None)
        self._kept: dict[int, np.ndarray] = {}
        """By member, its table in memory or in a file."""
        self._starts: dict[int, int] = {}
        """By member, where its table begins in the one on the device."""
        self._on_device: SoftTargets | None = None
        if self._asked:
            self._ask_once()
        if other is not None:
            for i in range(len(members)):
                self.held_out(i)
            other.let_go()

    def batches(self, examples: Sequence[Sequence[Any]], accumulate: int = 1) -> list[Batches]:
        """Each member's examples as batches of its own, in rows of the same lengths; every device has as many of
        them."""
        mesh, own = self._base.mesh, []
        multiples = {"rows_multiple": accumulate * parts("batch", mesh), "tokens_multiple": parts("seq", mesh)}
        for member, one, teachers in zip(self._members, examples, self._teachers, strict=True):
            train = member.config.train
            sizes = {"batch_size": train.batch_size, "max_length": train.max_length, "seed": member.config.seed}
            own.append(Batches(one, teachers.prompts, **sizes, **multiples))
        return alike(own)

    def _which(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Member i's examples and its held-out ones, as its teachers count them."""
        return tuple(np.split(np.arange(len(self._teachers[i].examples)), [len(self._members[i].examples)]))

    def _ask_once(self) -> None:
        taken, on_device = dict.fromkeys(ROOMS, 0), {}
        for i, (member, teachers) in enumerate(zip(self._members, self._teachers, strict=True)):
            settings, (train, held) = member.config.train, self._which(i)
            size = teachers.size(train, self._form)
            local = member.folder if jax.process_count() == 1 else None
            room = where_to_keep(size, settings, local, taken)
            if not self._in_step(i):
                if room is None:
                    raise JaxbakeError(
                        f"{member.name}: what its teacher says takes {size / 2**30:.3g} GiB, and there is no such room "
                        "beside the other bakes; raise train.teacher_host_gb, or bake it by itself"
                    )
            elif room is None or settings.steps * settings.batch_size <= len(train):  # each is visited once at most
                continue
            folder = member.folder / layout.TEACHER if room == "disk" else None
            kept = [(train, self._form, folder), (held, self._held_form, folder and folder / HELD_OUT)]
            table, held_table = keep_all(teachers, kept)  # asked about together, in the rows that a bake alone has
            self._held_out[i] = held_table.rows
            taken[room] += size
            # On a mesh each device is given what its rows need.
            (on_device if room == "device" and self._base.mesh is None else self._kept)[i] = table.rows
            teachers.forget()
        if on_device:
            ends = np.cumsum([rows.shape[0] for rows in on_device.values()])
            self._starts = {i: int(e) - on_device[i].shape[0] for i, e in zip(on_device, ends, strict=True)}
            self._on_device = jax.tree.map(jnp.asarray, columns(np.concatenate(list(on_device.values()))))

    def _in_step(self, i: int) -> bool:
        """Whether member i's teacher can be asked at every step: the base, behind one prompt."""
        return self._members[i].other is None and len(self._teachers[i].prompts) == 1

    def held_out(self, i: int) -> Any:
        """What member i's teacher says at its held-out examples; asked about them alone if not kept."""
        if i not in self._held_out:
            self._held_out[i] = keep_all(self._teachers[i], [(self._which(i)[1], self._held_form, None)])[0].rows
        return columns(self._held_out[i])

    def useful_fraction(self, i: int) -> float:
        """Share of a member's row tokens that are no padding."""
        return self._batches[i].useful_fraction()

    def batch(self, n: int, places: Sequence[int]) -> Batch:
        """The rows of step n, of these members in order."""
        return side_by_side([self._batches[i].batch(n) for i in places])

    def teacher(self, n: int, places: Sequence[int], batch: Batch) -> SoftTargets | None:
        """What the teachers say of that batch."""
        if not self._asked:
            return None
        mesh = self._base.mesh
        source = np.maximum(batch.source, 0).reshape(len(places), -1, batch.source.shape[1])  # padding takes any row
        if all(i in self._starts for i in places):
            offset = np.array([self._starts[i] for i in places], np.int32)[:, None, None]
            return take_rows(self._on_device, (source + offset).reshape(batch.source.shape))
        said = [self._said(n, i, source[place]) for place, i in enumerate(places)]

        def join(*parts: np.ndarray | jax.Array) -> jax.Array:
            if all(isinstance(x, np.ndarray) for x in parts):
                parts = (np.concatenate(parts),)
            axes = HIDDEN_AXES[: parts[0].ndim]
            return jnp.concatenate([put(x, axes, mesh) if isinstance(x, np.ndarray) else x for x in parts])

        return jax.tree.map(join, *said)

    def _said(self, n: int, i: int, source_BK: np.ndarray) -> Any:
        """What member i's teacher says of its rows of step n."""
        if i in self._starts:
            return take_rows(self._on_device, source_BK + self._starts[i])
        if i in self._kept:
            return columns(self._kept[i][source_BK])
        base, view = self._base, jax.tree.map(lambda x: padded(x, len(source_BK)), self._batches[i].batch(n).teacher)
        prefix = self._teachers[i].prefix()
        hidden = teacher_hidden_of(base.params, put_view(view, base.mesh), prefix, base.config)
        return in_form(base.params, hidden, base.config, self._form)


class Evaluation:
    """All members' held-out examples, in batches of which each member has some rows; the teachers are asked once."""

    def __init__(self, base: Base, members: Sequence[Any], rows: Rows):
        own = rows.batches([m.held_out for m in members])
        self._mesh = base.mesh
        self._parts: list[list[tuple[Batch, Any]]] = []
        for i, batches in enumerate(own):
            said = rows.held_out(i)

            def at(batch: Batch, said: Any = said) -> Any:
                return jax.tree.map(lambda x: x[np.maximum(batch.source, 0)], said)

            self._parts.append([(batch, at(batch)) for batch in batches.all()])
        self._joined: dict[tuple[int, ...], list[tuple[Batch, SoftTargets]]] = {}

    def _batches(self, places: Sequence[int]) -> list[tuple[Batch, SoftTargets]]:
        if tuple(places) not in self._joined:
            self._joined.clear()
            joined = []
            for k in range(max(len(self._parts[i]) for i in places)):
                # a member that has no more batches stands in with an empty one
                parts = [self._parts[i][k] if k < len(self._parts[i]) else _nothing(self._parts[i][0]) for i in places]
                batch = side_by_side([batch for batch, _ in parts])
                rows = batch.weights.shape[0] // len(places)
                said = jax.tree.map(partial(self._join, rows), *(said for _, said in parts))
                joined.append((put_batch(batch, self._mesh), said))
            self._joined[tuple(places)] = joined
        return self._joined[tuple(places)]

    def _join(self, rows: int, *parts: np.ndarray) -> jax.Array:
        return put(np.concatenate([padded(x, rows) for x in parts]), HIDDEN_AXES[: parts[0].ndim], self._mesh)

    def __call__(
        self, evaluate: Callable[..., tuple[jax.Array, ...]], delta: Any, params: Any, places: Sequence[int]
    ) -> dict[int, dict[str, float]]:
        """Held-out KL and agreement of each of these members."""
        sums = [evaluate(delta, params, batch, hidden) for batch, hidden in self._batches(places)]
        kl, count, agreement = (
            np.sum([hosts.fetch(x).astype(np.float64) for x in column], axis=0) for column in zip(*sums, strict=True)
        )
        return {
            i: {"held_out_kl": float(kl[m] / count[m]), "held_out_agreement": float(agreement[m] / count[m])}
            for m, i in enumerate(places)
        }


def _nothing(part: tuple[Batch, Any]) -> tuple[Batch, Any]:
    """A batch of the same form that weighs nothing."""
    batch, said = part
    return batch.replace(weights=np.zeros_like(batch.weights)), said
