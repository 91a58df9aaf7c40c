"""Several deltas of one base side by side, so that one pass over the base serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp

from jaxbake.config import LoraConfig
from jaxbake.deltas.lora import Delta


@flax.struct.dataclass
class Deltas:
    """M low-rank deltas of one base, for a batch whose rows each have one of them.

    factors: {slot: {"a": [L, M, I, R], "b": [L, M, R, O]}}; deltas of a smaller rank, or without a slot, have zeros
      there, which add nothing and whose gradient is zero.
    scale: float32 [M].
    rows: int32 [B], the delta of each row; None where the rows are M equal groups in order. Groups share one product
      each; by number, every row brings its own copy of its factors, a layer at a time.
    """

    factors: dict
    scale: jax.Array
    rows: jax.Array | None = None

    @property
    def count(self) -> int:
        return self.scale.shape[0]


def stack(deltas: Sequence[Delta]) -> Deltas:
    """The deltas as one, in order; R is the largest rank, the slots are those of all of them."""
    slots = dict.fromkeys(slot for delta in deltas for slot in delta.factors)
    rank = max(factor["a"].shape[-1] for delta in deltas for factor in delta.factors.values())
    factors = {}
    for slot in slots:
        layers, size_in, _ = next(d.factors[slot]["a"].shape for d in deltas if slot in d.factors)
        size_out = next(d.factors[slot]["b"].shape[-1] for d in deltas if slot in d.factors)
        factors[slot] = {
            "a": jnp.stack([_padded(d, slot, "a", (layers, size_in, rank)) for d in deltas], axis=1),
            "b": jnp.stack([_padded(d, slot, "b", (layers, rank, size_out)) for d in deltas], axis=1),
        }
    return Deltas(factors, jnp.stack([jnp.float32(d.scale) for d in deltas]))


def _padded(delta: Delta, slot: str, name: str, shape: tuple[int, ...]) -> jax.Array:
    if slot not in delta.factors:
        return jnp.zeros(shape, jnp.result_type(*jax.tree.leaves(delta.factors)))
    factor = delta.factors[slot][name]
    return jnp.pad(factor, [(0, want - have) for want, have in zip(shape, factor.shape, strict=True)])


def one_of(deltas: Deltas, m: int, like: LoraConfig, slots: Sequence[str]) -> Delta:
    """Delta m with its own rank and slots: what went into `stack`."""
    return Delta(cut(deltas.factors, m, like.rank, slots), deltas.scale[m], like)


def cut(factors: dict, m: int, rank: int, slots: Sequence[str]) -> dict:
    """Delta m's part of stacked factors, or of anything of their form (an optimizer's moments)."""
    return {slot: {"a": factors[slot]["a"][:, m, :, :rank], "b": factors[slot]["b"][:, m, :rank]} for slot in slots}


def for_rows(deltas: Deltas, rows: jax.Array) -> Deltas:
    """The deltas for a batch whose row b has delta `rows[b]`, int32 [B]."""
    return replace(deltas, rows=jnp.asarray(rows, jnp.int32))
