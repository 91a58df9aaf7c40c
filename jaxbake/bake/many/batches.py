"""The rows of many bakes side by side: a step's batch, what the teachers say about it, and the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bake import train as single
from jaxbake.data.batches import Batch, Batches, View, alike, shared_prefix
from jaxbake.models.base import Base
from jaxbake.models.decoder import Prefix
from jaxbake.sampling import shared_prefix as prefix_of

TEACHER_BYTES = 1 << 30
"""Up to this size the teachers' hidden states are kept on the device rather than computed again at each visit."""


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


class _Prompts:
    """Each member's prompt, read once: what all its teacher's rows begin with, and its keys and values."""

    def __init__(self, base: Base, members: Sequence[Any]):
        self.shared = [shared_prefix([*member.examples, *member.held_out]) for member in members]
        self._base, self._known = base, {}

    def __getitem__(self, i: int) -> Prefix | None:
        if i not in self._known:
            shared = self.shared[i]
            found = prefix_of(self._base.params, None, shared, config=self._base.config) if shared.size else None
            self._known[i] = found
        return self._known[i]

    def forget(self, i: int) -> None:
        self._known.pop(i, None)


def _sizes(member: Any) -> dict[str, int]:
    train = member.config.train
    return {"batch_size": train.batch_size, "max_length": train.max_length, "seed": member.config.seed}


def _said(base: Base, batches: Batches, prefix: Prefix | None, matched: int) -> np.ndarray:
    """A teacher's hidden states at every matched token [matched, D], in the order of `Batch.source`."""
    table = np.zeros((matched, base.config.hidden_size), base.params["norm"].dtype)
    single.ask_once(base, batches, prefix, table)
    return table


class Rows:
    """The training rows of all members, and their teachers' hidden states at the matched tokens.

    What a teacher says is computed before the first step, as long as `TEACHER_BYTES` hold it; the teachers of
    the members it has no room for are asked at every step.
    """

    def __init__(self, base: Base, members: Sequence[Any], accumulate: int):
        self._base, self._prompts = base, _Prompts(base, members)
        own = [
            Batches(member.examples, shared, rows_multiple=accumulate, **_sizes(member))
            for member, shared in zip(members, self._prompts.shared, strict=True)
        ]
        self._members = alike(own)
        tables: dict[int, jax.Array] = {}
        self._asked = members[0].config.loss.divergence != "cross_entropy"
        room = TEACHER_BYTES if self._asked else 0
        for i, batches in enumerate(self._members):
            matched = sum(int(example.mask.sum()) for example in batches.examples)
            room -= matched * base.config.hidden_size * base.params["norm"].dtype.itemsize
            if room < 0:
                break
            tables[i] = jnp.asarray(_said(base, batches, self._prompts[i], matched))
            self._prompts.forget(i)
        ends = np.cumsum([table.shape[0] for table in tables.values()])
        self._starts = {i: int(end) - table.shape[0] for (i, table), end in zip(tables.items(), ends, strict=True)}
        self._table = jnp.concatenate(list(tables.values())) if tables else None

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
        rows = batch.source.shape[0] // len(places)
        if all(i in self._starts for i in places):
            offset = np.repeat([self._starts[i] for i in places], rows).astype(np.int32)[:, None]
            return single.take_rows(self._table, np.where(batch.source >= 0, batch.source + offset, 0))
        parts = []
        for place, i in enumerate(places):
            if i in self._starts:
                source = batch.source[place * rows : (place + 1) * rows]
                parts.append(single.take_rows(self._table, np.where(source >= 0, source + self._starts[i], 0)))
            else:
                view = self._members[i].batch(n).teacher
                view = View(*(padded(getattr(view, name), rows) for name in View.__dataclass_fields__))
                parts.append(single.teacher_hidden_of(self._base.params, view, self._prompts[i], self._base.config))
        return jnp.concatenate(parts)


class Evaluation:
    """All members' held-out examples, in batches of which each member has some rows; the teachers are asked once."""

    def __init__(self, base: Base, members: Sequence[Any]):
        prompts = _Prompts(base, members)
        own = alike(
            [Batches(m.held_out, shared, **_sizes(m)) for m, shared in zip(members, prompts.shared, strict=True)]
        )
        self._parts: list[list[tuple[Batch, jax.Array]]] = []
        for i, batches in enumerate(own):
            found = []
            for batch in batches.all():
                hidden = single.teacher_hidden_of(base.params, batch.teacher, prompts[i], base.config)
                found.append((batch, hidden))
            prompts.forget(i)
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
                joined.append((jax.device_put(batch), jnp.concatenate(pad)))
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
