"""Attention: each implementation against XLA's, whatever a query may see, and which of them is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbake.chip import Chip
from jaxbake.errors import JaxbakeError
from jaxbake.models import attention, flash
from jaxbake.models.attention import Keys, Seen, attend, attend_jax_nn, choose

B, T, N, K, H, P = 2, 40, 4, 2, 16, 24


def make(seed=0, dtype=jnp.float32, window=None, blocks=("prefix", "own"), heads=(N, K)):
    """Queries of packed rows (with padding), and blocks of keys: a prefix seen in part, a cache, the rows' own."""
    n, k = heads
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape):
        return (1.5 * jax.random.normal(next(keys), shape)).astype(dtype)

    segments = np.zeros((B, T), np.int32)
    segments[0, :25], segments[0, 25:38], segments[1, :33] = 1, 2, 1
    visible = np.where(segments == 1, P, 7)
    visible[1] = np.where(segments[1] > 0, 16, 0)
    starts = np.array([[0] * 25 + [25] * 15, [0] * 40])
    positions = np.arange(T) - starts + visible
    first = None if window is None else positions - window + 1
    made = []
    if "prefix" in blocks:
        made.append(Keys(normal(P, k, H), normal(P, k, H), Seen(visible - 1, np.arange(P), first=first)))
    if "cache" in blocks:  # of the first segment, at the positions before the row's own
        cache_segments = np.array([[1] * 9 + [0] * 3, [1] * 5 + [0] * 7], np.int32)
        seen = Seen(positions, np.tile(np.arange(12), (B, 1)), segments, cache_segments, first)
        made.append(Keys(normal(B, 12, k, H), normal(B, 12, k, H), seen))
    if "own" in blocks:
        seen = Seen(positions, positions, segments, segments, first)
        made.append(Keys(normal(B, T, k, H), normal(B, T, k, H), seen))
    return normal(B, T, n, H), made, segments > 0


def both(q, blocks, real, softcap, implementation):
    """(output at real tokens, gradients by queries, keys and values) of a loss that padding does not enter."""
    mix = jax.random.normal(jax.random.key(9), (B, T, q.shape[2] * H))

    def loss(q, kv):
        made = [block._replace(k=k, v=v) for block, (k, v) in zip(blocks, kv, strict=True)]
        out = implementation(q, made, scale=0.3, **({} if softcap is None else {"softcap": softcap}))
        return jnp.sum(jnp.where(real[..., None], out.astype(jnp.float32) * mix, 0)), out

    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(q, [(b.k, b.v) for b in blocks])
    return [out[real], *jax.tree.leaves(grads)]


EVERYTHING = {"blocks": ("prefix", "cache", "own"), "window": 21}


@pytest.mark.parametrize(("case", "softcap"), [({"blocks": ("own",), "heads": (2, 2)}, None), (EVERYTHING, 6.0)])
def test_tpu_kernels_agree_with_xla(case, softcap):
    """Over tiles that are skipped, masked and whole; value and all gradients."""
    made = make(**case)
    xla = jax.jit(lambda: both(*made, softcap, partial(attend, implementation="xla")))()
    kernel = jax.jit(lambda: both(*made, softcap, partial(flash.attend, tiles=(16, 8, 8, 16), interpret=True)))()
    for a, b in zip(kernel, xla, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_long_rows_take_the_backward_pass_in_pieces(monkeypatch):
    made = make(blocks=("own",), heads=(2, 2))
    whole = jax.jit(lambda: both(*made, None, partial(attend, implementation="xla")))()
    monkeypatch.setattr(flash, "_longest_row", lambda *_: 24)
    pieces = jax.jit(lambda: both(*made, None, partial(flash.attend, tiles=(64, 64, 64, 64), interpret=True)))()
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("case", "softcap"), [({}, None), (EVERYTHING, 6.0)])
def test_rows_in_turn_are_rows_at_once(case, softcap, monkeypatch):
    q, blocks, real = make(**case)

    def out():
        traced = jax.jit(lambda: attend(q, blocks, scale=0.3, softcap=softcap)).trace()
        return str(traced.jaxpr).count("scan["), traced.lower().compile()()

    at_once, expected = out()
    monkeypatch.setattr(attention, "MOST_LOGITS", 0)
    in_turn, found = out()
    assert (at_once, in_turn) == (0, 1)
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", [{}, {"blocks": ("own",), "window": 13}, EVERYTHING], ids=["prefix", "own", "cache"])
def test_joining_jax_nn_agrees_with_xla(case):
    """The way cuDNN is called on a GPU, by XLA's implementation of the same function."""
    made = make(**case)
    xla = jax.jit(lambda: both(*made, None, partial(attend, implementation="xla")))()
    joined = jax.jit(lambda: both(*made, None, partial(attend_jax_nn, library="xla")))()
    for a, b in zip(joined, xla, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_the_mask_is_what_it_says():
    _, (prefix, own), real = make(window=9)
    seen = own.seen.mask()
    for b, t, s in np.ndindex(seen.shape):
        same = own.seen.segments[b, t] == own.seen.segments[b, s]
        back = own.seen.positions[b, t] - own.seen.positions[b, s]
        assert seen[b, t, s] == (same and 0 <= back < 9)
    assert not prefix.seen.mask()[~real].any() or prefix.seen.last[~real].min() >= 0
    assert prefix.seen.mask().sum(-1).max() <= 9


def test_rows_that_see_nothing_stay_finite():
    q, blocks, _ = make(blocks=("own",))
    blind = [blocks[0]._replace(seen=blocks[0].seen._replace(last=np.full((B, T), -1)))]
    for implementation in ("xla", "pallas"):
        step = jax.jit(jax.grad(lambda q, i=implementation: attend(q, blind, scale=1.0, implementation=i).sum()))
        assert jnp.isfinite(step(q)).all()


@pytest.mark.parametrize(
    ("chip", "dtype", "shape", "softcap", "expected"),
    [
        (Chip("tpu", "TPU v5 lite", True), jnp.bfloat16, (2, 512, 8, 64), 50.0, "pallas"),
        (Chip("tpu", "TPU v5 lite", True), jnp.float32, (2, 512, 8, 64), None, "pallas"),
        (Chip("tpu", "TPU v5 lite", True), jnp.bfloat16, (2, 1, 8, 64), None, "xla"),
        (Chip("tpu", "TPU v5 lite", False), jnp.bfloat16, (2, 512, 8, 64), None, "xla"),
        (Chip("gpu", "H100", True), jnp.bfloat16, (2, 512, 8, 128), None, "cudnn"),
        (Chip("gpu", "H100", True), jnp.bfloat16, (2, 512, 8, 128), 50.0, "xla"),
        (Chip("gpu", "H100", True), jnp.float32, (2, 512, 8, 128), None, "xla"),
        (Chip("gpu", "H100", True), jnp.bfloat16, (2, 512, 8, 256), None, "xla"),
        (Chip("cpu", "cpu", True), jnp.bfloat16, (2, 512, 8, 128), None, "xla"),
    ],
)
def test_which_implementation_auto_is(chip, dtype, shape, softcap, expected):
    assert choose(chip, jax.ShapeDtypeStruct(shape, dtype), softcap) == expected


def test_an_unknown_implementation_is_named():
    q, blocks, _ = make()
    with pytest.raises(JaxbakeError, match="'flash' is none of auto, xla, pallas, cudnn"):
        attend(q, blocks, scale=1.0, implementation="flash")
