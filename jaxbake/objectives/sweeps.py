"""What the TPU kernels do with a tile: `objectives.kernel` lays them out over tokens and vocabulary.

Each is called as `kernel(valid, operands, known, sums, kept)`: scalar reference to how many of the vocabulary's rows
are real, references to a tile of what it reads, to what is known of its tokens (128 times, a lane each), to the sums
that it adds to, and to the logits that it is to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxbake.objectives.inputs import Divergence
from jaxbake.objectives.sums import ABSENT
from jaxbake.objectives.terms import Known, Sums, above_centre, terms

LANES = 128


@dataclass(frozen=True)
class Settings:
    """What is fixed when a kernel is traced; grid: tiles of tokens and of vocabulary."""

    how: Divergence
    size: int  # of the vocabulary
    tokens: int  # of a tile
    vocab: int
    grid: tuple[int, int]
    recompute: bool
    interpret: bool

    def array(self, columns: int) -> jax.ShapeDtypeStruct:
        """A row of float32 numbers for every token."""
        return jax.ShapeDtypeStruct((self.grid[0] * self.tokens, columns), jnp.float32)


class Operands(NamedTuple):
    """What a sweep multiplies, and logits that it need not make. None: not needed; of teacher_head, the student's."""

    student: Any = None
    teacher: Any = None
    head: Any = None
    teacher_head: Any = None
    s: Any = None
    t: Any = None


def normalisers(valid_ref, operands: Operands, known: None, sums: Sums, kept: tuple, *, set_: Settings):
    """The running softmaxes of the lanes, and the logits."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        for ref, start in zip(sums, (ABSENT, 0.0, ABSENT, 0.0, 0.0), strict=True):
            if ref is not None:
                ref[...] = jnp.full_like(ref, start)

    def sweep(masked: bool):
        t = None
        if operands.teacher is not None:
            t = _teacher_logits(set_, operands)
            t = jnp.where(_real(valid_ref, j, t.shape), t, ABSENT) if masked else t
            _add(t, sums.t_peak, sums.t_total)
        s = _student_logits(set_, operands)
        s = jnp.where(_real(valid_ref, j, s.shape), s, ABSENT) if masked else s
        _add(s, sums.s_peak, sums.s_total, t, sums.gap)
        for x, ref in zip((s, t), kept, strict=True):
            if ref is not None:
                ref[...] = x

    _whole_or_masked(valid_ref, j, set_, sweep)


def _add(x: jax.Array, peak_ref: Any, total_ref: Any, other: jax.Array | None = None, gap_ref: Any = None) -> None:
    """A tile of logits added to the lanes' running softmax; gap: how much `other` is larger where x is largest."""
    slices = [slice(at, at + LANES) for at in range(0, x.shape[1], LANES)]
    peak = before = peak_ref[...]
    for lanes in slices:
        if gap_ref is not None:
            gap_ref[...] = jnp.where(x[:, lanes] > peak, other[:, lanes] - x[:, lanes], gap_ref[...])
        peak = jnp.maximum(peak, x[:, lanes])
    total = total_ref[...] * jnp.exp(before - peak)
    for lanes in slices:
        total += jnp.exp(x[:, lanes] - peak)
    peak_ref[...], total_ref[...] = peak, total


def means(valid_ref, operands: Operands, known: Known, mean_ref, kept: None, *, set_: Settings):
    """Of the lanes, how far what the slopes go by lies above its centre under q."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        mean_ref[...] = jnp.zeros_like(mean_ref)

    def sweep(masked: bool):
        s, t = _student_logits(set_, operands), _teacher_logits(set_, operands)
        here, mean = jax.tree.map(lambda ref: ref[...], known), mean_ref[...]
        real = _real(valid_ref, j, s.shape) if masked else None
        for at in range(0, s.shape[1], LANES):
            lanes = slice(at, at + LANES)
            more = above_centre(set_.how, s[:, lanes], t[:, lanes], here)
            mean += jnp.where(real[:, lanes], more, 0.0) if masked else more
        mean_ref[...] = mean

    _whole_or_masked(valid_ref, j, set_, sweep)


def weigh(valid_ref, operands: Operands, known: Known, sums: tuple, kept: None, *, set_: Settings):
    """The terms of the divergence, and its slopes times the vocabulary."""
    j, (loss_ref, grad_ref) = pl.program_id(1), sums

    @pl.when(j == 0)
    def _():
        loss_ref[...] = jnp.zeros_like(loss_ref)
        grad_ref[...] = jnp.zeros_like(grad_ref)

    def sweep(masked: bool):
        s, t = _student_logits(set_, operands), _teacher_logits(set_, operands)
        head, here = operands.head[...], jax.tree.map(lambda ref: ref[...], known)
        real = _real(valid_ref, j, s.shape) if masked else None
        loss, slopes = loss_ref[...], []
        for at in range(0, s.shape[1], LANES):
            lanes = slice(at, at + LANES)
            columns = lax.broadcasted_iota(jnp.int32, loss.shape, 1) + (j * set_.vocab + at)
            term, slope = terms(set_.how, s[:, lanes], None if t is None else t[:, lanes], here, columns)
            if masked:
                term, slope = (jnp.where(real[:, lanes], x, 0.0) for x in (term, slope))
            loss += term
            slopes.append(slope.astype(jnp.bfloat16) if head.dtype == jnp.bfloat16 else slope)
        loss_ref[...] = loss
        if masked:  # beyond the last row a tile holds anything, NaN included
            head = jnp.where(_real(valid_ref, j, head.shape, axis=0), head, jnp.zeros_like(head))
        grad_ref[...] += _dot(jnp.concatenate(slopes, axis=1), head, 0)

    _whole_or_masked(valid_ref, j, set_, sweep)


def _student_logits(set_: Settings, operands: Operands) -> jax.Array:
    """A tile of them, kept or made."""
    if operands.s is not None:
        return operands.s[...]
    return _logits(set_, operands.student, operands.head, set_.how.softcap)


def _teacher_logits(set_: Settings, operands: Operands) -> jax.Array | None:
    if operands.t is not None:
        return operands.t[...]
    if operands.teacher is None:
        return None
    head = operands.head if operands.teacher_head is None else operands.teacher_head
    return _logits(set_, operands.teacher, head, set_.how.teacher_softcap)


def _logits(set_: Settings, hidden_ref: Any, head_ref: Any, softcap: float | None) -> jax.Array:
    logits = _dot(hidden_ref[...], head_ref[...], 1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if set_.how.temperature == 1 else logits / set_.how.temperature


def _whole_or_masked(valid_ref, j: jax.Array, set_: Settings, sweep: Callable) -> None:
    """Most tiles hold real rows alone; those with none are left out (their kept logits are not read either)."""
    start, valid = j * set_.vocab, valid_ref[0]
    pl.when(start + set_.vocab <= valid)(partial(sweep, masked=False))
    pl.when((start < valid) & (start + set_.vocab > valid))(partial(sweep, masked=True))


def _real(valid_ref, j: jax.Array, shape: tuple[int, int], axis: int = 1) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis) + j * shape[axis] < valid_ref[0]


def _dot(a: jax.Array, b: jax.Array, axis_b: int) -> jax.Array:
    a, b = (x.astype(jnp.promote_types(a.dtype, b.dtype)) for x in (a, b))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
