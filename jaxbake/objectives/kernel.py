"""Forward KL and its gradient on TPU (Pallas), a tile of the vocabulary at a time.

Two sweeps over the vocabulary. The first multiplies teacher and student states with one tile of the unembedding after
another and keeps the running maximum and sum of both softmaxes, 128 of each per token (one a lane), so that nothing is
reduced across lanes before the end. The second has the normalisers, forms the divergence's terms and q - p, and adds
(q - p) @ W up in VMEM. In one sweep, q @ W and p @ W would have to be summed apart, and their difference, which is what
is wanted, would be lost in bfloat16 rounding once the student is close.

What the second sweep does for logits: "pallas" reads those of a chunk of tokens back from HBM, where the first wrote
them (3 products in all, as in the chunked version, whose passes over [tokens, vocabulary] between the products are
saved); "pallas_recompute" multiplies again (5 products) and never holds [tokens, vocabulary] anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxbake.objectives.inputs import Divergence, Heads, Tokens

ABSENT = -1e30
LANES = 128
TILES = {
    ("TPU v5 lite", "bfloat16"): (512, 256),
    ("TPU v5", "bfloat16"): (512, 256),
    ("TPU v6 lite", "bfloat16"): (1024, 256),
}
"""Tokens and vocabulary rows of a tile by chip and dtype. Each tile of tokens reads the whole unembedding twice: there
must be so many that the products take longer than that, on a v6e twice as many as on the others. More vocabulary rows
make longer programs and not faster ones: at width 4096 a v5e's schedule of a 512 x 256 tile is 14.5 and 8.0 thousand
cycles for the two sweeps, where the products alone take 16.4 and 8.2; 512 x 512 is twice that, as are its products."""
TILES_ELSEWHERE = (128, 256)
_VMEM = 72 * 2**20


@dataclass(frozen=True)
class _Settings:
    temperature: float
    softcap: float | None
    teacher_softcap: float | None
    tokens: int
    vocab: int
    recompute: bool
    interpret: bool


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
    """KL(p || q) at each token [C], and its gradient by the student's hidden states [C, D], both float32.

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
    set_ = _Settings(how.temperature, how.softcap, how.teacher_softcap, rows, columns, recompute, interpret)
    student, teacher = (_fill(x, rows) for x in (tokens.hidden_ND, tokens.teacher_hidden_NE))
    valid = jnp.full((1,), vocab, jnp.int32) if valid is None else jnp.asarray(valid, jnp.int32).reshape(1)
    *partial_sums, logits = _normalisers(set_, valid, student, teacher, heads)
    statistics = [x for pair in (partial_sums[:2], partial_sums[2:]) for x in _join(*pair, axes)]
    loss, grad = _terms(set_, valid, student, teacher, heads, statistics, logits)
    loss = jnp.sum(loss[:count], axis=-1)
    return lax.psum(loss, axes) if axes else loss, grad[:count] / how.temperature


def _tiles(kind: str, tokens: Tokens, heads: Heads) -> tuple[int, int]:
    """What the table says, with fewer tokens where their states, gradients and the tiles of W would not fit VMEM."""
    dtype = jnp.result_type(*(x for x in (*tokens[:2], *heads[:2]) if x is not None))
    rows, columns = TILES.get((kind, str(dtype)), TILES_ELSEWHERE)
    width = tokens.hidden_ND.shape[1]
    widths = width + tokens.teacher_hidden_NE.shape[1]
    tables = 2 * columns * dtype.itemsize * (width if heads.teacher_VE is None else widths)
    while rows > 64 and tables + 2 * rows * (widths * dtype.itemsize + 4 * width) > _VMEM:
        rows //= 2
    return rows, columns


def _join(peak_CL: jax.Array, total_CL: jax.Array, axes: tuple[str, ...]) -> list[jax.Array]:
    """Maximum and log of the sum of exp(logit - maximum), over lanes and devices, repeated along the lanes [C, 128]."""
    peak_C1 = jnp.max(peak_CL, axis=-1, keepdims=True)
    peak_C1 = lax.pmax(peak_C1, axes) if axes else peak_C1
    total_C1 = jnp.sum(total_CL * jnp.exp(peak_CL - peak_C1), axis=-1, keepdims=True)
    total_C1 = lax.psum(total_C1, axes) if axes else total_C1
    return [jnp.broadcast_to(x, peak_CL.shape) for x in (peak_C1, jnp.log(total_C1))]


def _specs(set_: _Settings, heads: Heads, width: int, teacher_width: int) -> tuple[list, list]:
    """Blocks of the two hidden states, and of the one or two unembeddings."""
    states = [pl.BlockSpec((set_.tokens, w), lambda i, j, _: (i, 0)) for w in (width, teacher_width)]
    tables = [pl.BlockSpec((set_.vocab, width), lambda i, j, _: (j, 0))]
    if heads.teacher_VE is not None:
        tables.append(pl.BlockSpec((set_.vocab, teacher_width), lambda i, j, _: (j, 0)))
    return states, tables


def _normalisers(set_: _Settings, valid, student, teacher, heads: Heads):
    """Per lane: maximum and sum of the student's, then of the teacher's softmax [C, 128]; and the logits if kept."""
    count, vocab = student.shape[0], heads.student_VD.shape[0]
    states, tables = _specs(set_, heads, student.shape[1], teacher.shape[1])
    grid = (count // set_.tokens, pl.cdiv(vocab, set_.vocab))
    of_token = pl.BlockSpec((set_.tokens, LANES), lambda i, j, _: (i, 0))
    of_logits = pl.BlockSpec((set_.tokens, set_.vocab), lambda i, j, _: (i, j))
    outs = [(of_token, jax.ShapeDtypeStruct((count, LANES), jnp.float32))] * 4
    if not set_.recompute:
        outs += [(of_logits, jax.ShapeDtypeStruct((count, grid[1] * set_.vocab), jnp.float32))] * 2
    products = 2 * count * vocab * (student.shape[1] + teacher.shape[1])
    out = pl.pallas_call(
        partial(_normalisers_kernel, set_=set_),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=states + tables, out_specs=[spec for spec, _ in outs]
        ),
        out_shape=[shape for _, shape in outs],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(products, 2 * count * vocab, grid[0] * heads.student_VD.nbytes),
        interpret=set_.interpret,
        name="kl_normalisers",
    )(valid, student, teacher, *(x for x in heads[:2] if x is not None))
    return *out[:4], tuple(out[4:])


def _terms(set_: _Settings, valid, student, teacher, heads: Heads, statistics: list, logits: tuple):
    """Per lane the sum of the divergence's terms [C, 128], and temperature times the gradient [C, D]."""
    count, vocab, width = student.shape[0], *heads.student_VD.shape
    states, tables = _specs(set_, heads, width, teacher.shape[1])
    of_token = pl.BlockSpec((set_.tokens, LANES), lambda i, j, _: (i, 0))
    of_logits = pl.BlockSpec((set_.tokens, set_.vocab), lambda i, j, _: (i, j))
    if set_.recompute:
        inputs, specs = [student, teacher, *(x for x in heads[:2] if x is not None)], states + tables
    else:
        inputs, specs = [*logits, heads.student_VD], [of_logits, of_logits, tables[0]]
    grid = (count // set_.tokens, pl.cdiv(vocab, set_.vocab))
    products = 2 * count * vocab * (width + (width + teacher.shape[1] if set_.recompute else 0))
    return pl.pallas_call(
        partial(_terms_kernel, set_=set_),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[of_token] * 4 + specs,
            out_specs=[of_token, pl.BlockSpec((set_.tokens, width), lambda i, j, _: (i, 0))],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((count, LANES), jnp.float32),
            jax.ShapeDtypeStruct((count, width), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(products, 2 * count * vocab, grid[0] * heads.student_VD.nbytes),
        interpret=set_.interpret,
        name="kl_terms",
    )(valid, *statistics, *inputs)


def _logits(set_: _Settings, hidden: jax.Array, head: jax.Array, softcap: float | None) -> jax.Array:
    logits = _dot(hidden, head, 1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if set_.temperature == 1 else logits / set_.temperature


def _normalisers_kernel(valid_ref, student_ref, teacher_ref, head_ref, *refs, set_: _Settings):
    teacher_head_ref, outs = (head_ref, refs) if len(refs) in (4, 6) else (refs[0], refs[1:])
    sums, logits = outs[:4], outs[4:]
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        for ref, start in zip(sums, (ABSENT, 0.0) * 2, strict=True):
            ref[...] = jnp.full_like(ref, start)

    def sweep(masked: bool):
        sides = (
            (student_ref, head_ref, set_.softcap, sums[:2]),
            (teacher_ref, teacher_head_ref, set_.teacher_softcap, sums[2:]),
        )
        for n, (hidden_ref, table_ref, softcap, (peak_ref, total_ref)) in enumerate(sides):
            x = _logits(set_, hidden_ref[...], table_ref[...], softcap)
            if masked:
                x = jnp.where(_real(valid_ref, j, x.shape), x, ABSENT)
            if logits:
                logits[n][...] = x
            slices = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
            before = peak_ref[...]
            peak = before
            for part in slices:
                peak = jnp.maximum(peak, part)
            total = total_ref[...] * jnp.exp(before - peak)
            for part in slices:
                total += jnp.exp(part - peak)
            peak_ref[...], total_ref[...] = peak, total

    _whole_or_masked(valid_ref, j, set_, sweep)


def _terms_kernel(valid_ref, *refs, set_: _Settings):
    statistics, inputs, (loss_ref, grad_ref) = refs[:4], refs[4:-2], refs[-2:]
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        loss_ref[...] = jnp.zeros_like(loss_ref)
        grad_ref[...] = jnp.zeros_like(grad_ref)

    def sweep(masked: bool):
        if set_.recompute:
            student_ref, teacher_ref, head_ref, *other = inputs
            head = head_ref[...]
            s = _logits(set_, student_ref[...], head, set_.softcap)
            t = _logits(set_, teacher_ref[...], other[0][...] if other else head, set_.teacher_softcap)
        else:
            s, t, head = (ref[...] for ref in inputs)
        s_peak, s_log, t_peak, t_log = (ref[...] for ref in statistics)
        shift = (t_peak - s_peak) + (t_log - s_log)
        real = _real(valid_ref, j, s.shape) if masked else None
        loss, slopes = loss_ref[...], []
        for at in range(0, s.shape[1], LANES):
            lanes = slice(at, at + LANES)
            q = jnp.exp((s[:, lanes] - s_peak) - s_log)
            p = jnp.exp((t[:, lanes] - t_peak) - t_log)
            term, slope = kl_term(p, q, (t[:, lanes] - s[:, lanes]) - shift), q - p
            if set_.softcap is not None:
                slope *= 1 - jnp.square(s[:, lanes] * (set_.temperature / set_.softcap))
            if masked:
                term, slope = (jnp.where(real[:, lanes], x, 0.0) for x in (term, slope))
            loss += term
            slopes.append(slope.astype(jnp.bfloat16) if head.dtype == jnp.bfloat16 else slope)
        loss_ref[...] = loss
        if masked:  # beyond the last row a tile holds anything, NaN included
            head = jnp.where(_real(valid_ref, j, head.shape, axis=0), head, jnp.zeros_like(head))
        grad_ref[...] += _dot(jnp.concatenate(slopes, axis=1), head, 0)

    _whole_or_masked(valid_ref, j, set_, sweep)


def kl_term(p: jax.Array, q: jax.Array, r: jax.Array) -> jax.Array:
    """A term of KL(p || q), r = log p/q, of one sign: see `fused._kl_terms`."""
    series = r * r * (1 / 2 + r * (-1 / 6 + r * (1 / 24 + r * (-1 / 120 + r * (1 / 720 - r / 5040)))))
    return jnp.where(jnp.abs(r) < 0.3, p * series, (q - p) + p * r)


def _whole_or_masked(valid_ref, j: jax.Array, set_: _Settings, sweep) -> None:
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


def _fill(x: jax.Array, multiple: int) -> jax.Array:
    more = -x.shape[0] % multiple
    return jnp.pad(x, ((0, more), (0, 0))) if more else x


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=100 * 2**20)


def _cost(flops: int, transcendentals: int, bytes_accessed: int) -> pl.CostEstimate:
    """For XLA's scheduler."""
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=bytes_accessed)
