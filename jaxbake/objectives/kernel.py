"""The divergences and their gradients on TPU (Pallas), a tile of the vocabulary at a time.

Two or three sweeps over the vocabulary. The first multiplies the states with one tile of the unembedding after another
and keeps the running maximum and sum of the softmaxes, 128 of each per token (one a lane), so that nothing is reduced
across lanes before the end. The last has the normalisers, forms the divergence's terms and its slopes (q - p for the
forward KL), and adds slopes @ W up in VMEM. Summed in one sweep, q @ W and p @ W would have to be kept apart, and their
difference, which is what is wanted, would be lost in bfloat16 rounding once the student is close. Between the two, the
reverse and the Jensen-Shannon divergence sweep once more for the mean that their slopes are compared with, of values
that take both normalisers (see `objectives.terms`, which has the arithmetic).

What the later sweeps do for logits: "pallas" reads those of a chunk of tokens back from HBM, where the first wrote
them (3 products in all, as in the chunked version, whose passes over [tokens, vocabulary] between the products are
saved; of cross-entropy 2); "pallas_recompute" multiplies again (5 products; 7 with a mean, 3 of cross-entropy) and
never holds [tokens, vocabulary] anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxbake.objectives.inputs import Divergence, Heads, Tokens
from jaxbake.objectives.sums import vocab_sum
from jaxbake.objectives.sweeps import LANES, Operands, Settings, means, normalisers, weigh
from jaxbake.objectives.terms import MEANS, Known, Sums, find_targets, join

TILES = {
    ("TPU v5 lite", "bfloat16"): (512, 256),
    ("TPU v5", "bfloat16"): (512, 256),
    ("TPU v6 lite", "bfloat16"): (1024, 256),
}
"""Tokens and vocabulary rows of a tile by chip and dtype. Each tile of tokens reads the whole unembedding twice: there
must be so many that the products take longer than that, on a v6e twice as many as on the others. More vocabulary rows
make longer programs and not faster ones: as the compiler schedules them, the sweeps of a v5e are bound by the products
either way, but that for means, which is bound by reading the logits."""
TILES_ELSEWHERE = (128, 256)
_VMEM = 72 * 2**20


def loss_and_grad(
    how: Divergence,
    tokens: Tokens,
    heads: Heads,
    *,
    valid: jax.Array | None = None,
    axes: tuple[str, ...] = (),
    recompute: bool = False,
    kind: str = "",
    interpret: bool = False,
    tiles: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The divergence at each token [C], and its gradient by the student's hidden states [C, D], both float32.

    Args:
      valid: scalar, how many of the unembedding's first rows are real; None for all.
      axes: mesh axes (inside `jax.shard_map`) over whose devices the vocabulary lies in parts. Only numbers per token
        are exchanged; the loss comes out whole, the gradient as this device's share of a sum over them.
      tiles: tokens and vocabulary rows of a tile; by default what was found best for the chip `kind`.
    """
    count, vocab = tokens.hidden_ND.shape[0], heads.student_VD.shape[0]
    rows, columns = tiles or _tiles(kind, tokens, heads)
    rows = -(-count // (16 * pl.cdiv(count, rows))) * 16  # little padding
    columns = min(columns, -(-vocab // LANES) * LANES)
    grid = pl.cdiv(count, rows), pl.cdiv(vocab, columns)
    set_ = Settings(how, vocab, rows, columns, grid, recompute, interpret)
    valid = jnp.full((1,), vocab, jnp.int32) if valid is None else jnp.asarray(valid, jnp.int32).reshape(1)
    tokens = jax.tree.map(lambda x: _fill(x, rows), tokens)
    operands = Operands(*tokens[:2], *heads[:2])
    sums, kept = _normalisers(set_, valid, operands)
    known, found_C1 = join(how, sums, axes), None
    if how.name == "cross_entropy":
        target_C1, found_C1 = find_targets(tokens.targets_N, heads.first, valid[0], axes)
        known = known._replace(target=target_C1)
    if not recompute:
        operands = Operands(None, None, heads.student_VD, None, *kept)
    if how.name in MEANS:
        known = known._replace(mean=vocab_sum(_means(set_, valid, operands, known), axes)[:, None])
    loss_CL, grad_CD = _terms(set_, valid, operands, known)
    loss_C = vocab_sum(loss_CL, axes)
    if found_C1 is not None:  # no such token: no loss and no gradient
        loss_C, grad_CD = jnp.where(found_C1[:, 0], loss_C, jnp.nan), jnp.where(found_C1, grad_CD, jnp.nan)
    return loss_C[:count], grad_CD[:count] / how.temperature


def _tiles(kind: str, tokens: Tokens, heads: Heads) -> tuple[int, int]:
    """What the table says, with fewer tokens where their states, gradients and the tiles of W would not fit VMEM."""
    states = [x for x in tokens[:2] if x is not None]
    dtype = jnp.result_type(*states, *(x for x in heads[:2] if x is not None))
    rows, columns = TILES.get((kind, str(dtype)), TILES_ELSEWHERE)
    width, widths = states[0].shape[1], sum(x.shape[1] for x in states)
    tables = 2 * columns * dtype.itemsize * (width if heads.teacher_VE is None else widths)
    while rows > 64 and tables + 2 * rows * (widths * dtype.itemsize + 4 * width) > _VMEM:
        rows //= 2
    return rows, columns


def _normalisers(set_: Settings, valid: jax.Array, operands: Operands) -> tuple[Sums, tuple]:
    """What there is of `Sums`, of every lane [C, 128]; and the student's and the teacher's logits, None if not kept."""
    alone = operands.teacher is None
    lanes, logits = set_.array(LANES), None if set_.recompute else set_.array(set_.grid[1] * set_.vocab)
    sums = Sums(lanes, lanes) if alone else Sums(*[lanes] * 4, gap=lanes if set_.how.name in MEANS else None)
    kept = logits, None if alone else logits
    return _sweep(normalisers, "kl_normalisers", set_, valid, operands, None, sums, kept)


def _means(set_: Settings, valid: jax.Array, operands: Operands, known: Known) -> jax.Array:
    """Of every lane the sum of `above_centre` [C, 128]."""
    operands = operands if set_.recompute else operands._replace(head=None)
    return _sweep(means, "kl_means", set_, valid, operands, known, set_.array(LANES))[0]


def _terms(set_: Settings, valid: jax.Array, operands: Operands, known: Known) -> tuple[jax.Array, jax.Array]:
    """Of every lane the sum of the divergence's terms [C, 128], and temperature times the gradient [C, D]."""
    width = operands.head.shape[1]
    sums = set_.array(LANES), set_.array(width)
    return _sweep(weigh, "kl_terms", set_, valid, operands, known, sums, added=width)[0]


def _sweep(
    kernel: Callable,
    name: str,
    set_: Settings,
    valid: jax.Array,
    operands: Operands,
    known: Known | None,
    sums: Any,
    kept: Any = None,
    added: int = 0,
) -> tuple[Any, Any]:
    """A kernel (see `objectives.sweeps`) for every tile of tokens and, for each of these, of the vocabulary.

    Gives its sums, a row for every token, and the logits that it keeps, both as they are described here. added: the
    width of the vocabulary that it multiplies the slopes by.
    """
    count = set_.grid[0] * set_.tokens
    known = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, LANES)), known)

    def of_tokens(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((set_.tokens, x.shape[1]), lambda i, j, _: (i, 0))

    def of_vocab(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((set_.vocab, x.shape[1]), lambda i, j, _: (j, 0))

    def of_both(_: Any) -> pl.BlockSpec:
        return pl.BlockSpec((set_.tokens, set_.vocab), lambda i, j, _: (i, j))

    states, tables, logits = operands[:2], operands[2:4], operands[4:]
    blocks = *jax.tree.map(of_tokens, states), *jax.tree.map(of_vocab, tables), *jax.tree.map(of_both, logits)
    widths = added + sum(x.shape[1] for x in states if x is not None)
    return pl.pallas_call(
        partial(kernel, set_=set_),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=set_.grid,
            in_specs=[Operands(*blocks), jax.tree.map(of_tokens, known)],
            out_specs=(jax.tree.map(of_tokens, sums), jax.tree.map(of_both, kept)),
        ),
        out_shape=(sums, kept),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20
        ),
        cost_estimate=pl.CostEstimate(  # for XLA's scheduler, and for plans
            flops=2 * count * set_.size * widths,
            transcendentals=2 * count * set_.size,
            bytes_accessed=set_.grid[0] * _bytes(tables) + _bytes((logits, kept)),
        ),
        interpret=set_.interpret,
        name=name,
    )(valid, operands, known)


def _fill(x: jax.Array, multiple: int) -> jax.Array:
    more = -x.shape[0] % multiple
    return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) if more else x


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
