"""A teacher's top k and tail: the divergence over k + 1 outcomes against the plain one in float64, its bounds, and what
is never held."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbake.errors import JaxbakeError
from jaxbake.objectives import TopK, fused_kl, fused_metrics, reference_kl, top_k_of

TOKENS, VOCAB, WIDTH = 60, 203, 16


def make_inputs(logit_std=3.0, seed=0, near=None):
    """(student hidden, unembedding, teacher hidden, weights), logits of the given deviation."""
    rng = np.random.default_rng(seed)
    unembed = rng.normal(size=(VOCAB, WIDTH)) * logit_std / np.sqrt(WIDTH)
    teacher = rng.normal(size=(TOKENS, WIDTH))
    student = rng.normal(size=(TOKENS, WIDTH)) if near is None else teacher + near * rng.normal(size=(TOKENS, WIDTH))
    return [x.astype(np.float32) for x in (student, unembed, teacher, rng.uniform(0.2, 2.0, size=TOKENS))]


def value_and_grad(objective, **options):
    def loss(student, unembed, top, weights):
        return objective(student, unembed, top, None, weights, **options)[0]

    return jax.jit(jax.value_and_grad(loss))


def off(x, true):
    x, true = np.asarray(x, np.float64), np.asarray(true, np.float64)
    return np.linalg.norm(x - true) / np.linalg.norm(true)


@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "temperature": 1.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_agrees_with_a_float64_reference(divergence, options):
    step = value_and_grad(fused_kl, divergence=divergence, chunk_size=16, **options)
    with jax.enable_x64(True):
        reference = value_and_grad(reference_kl, divergence=divergence, **options)
        double = value_and_grad(fused_kl, divergence=divergence, chunk_size=16, **options)
    for logit_std, k in ((3.0, 1), (5.0, 64)):
        student, unembed, teacher, weights = make_inputs(logit_std)
        top = top_k_of(teacher, unembed, k, chunk_size=16, **options)
        value, grad = step(student, unembed, top, weights)
        with jax.enable_x64(True):
            student, unembed, teacher, weights = (
                np.asarray(x, np.float64) for x in (student, unembed, teacher, weights)
            )
            exact = top_k_of(teacher, unembed, k, **options)
            true_value, true_grad = reference(student, unembed, exact, weights)
            double_value, double_grad = double(student, unembed, exact, weights)
        assert true_value.dtype == jnp.float64
        assert off(value, true_value) <= 2e-6 and off(grad, true_grad) <= 2e-6
        assert off(double_value, true_value) <= 1e-12 and off(double_grad, true_grad) <= 1e-12


def test_the_top_k_are_the_most_likely_and_the_tail_is_the_rest():
    _, unembed, teacher, _ = make_inputs()
    top = top_k_of(teacher.reshape(4, 15, WIDTH), unembed, 5, chunk_size=7)
    probs = np.asarray(jax.nn.softmax(teacher @ unembed.T)).reshape(4, 15, VOCAB)
    order = np.argsort(-probs, axis=-1)[..., :5]
    np.testing.assert_array_equal(top.ids, order)
    kept = np.take_along_axis(probs, order, -1)
    np.testing.assert_allclose(np.exp(top.log_probs), kept, rtol=1e-5)
    np.testing.assert_allclose(np.exp(top.log_tail), 1 - kept.sum(-1), rtol=1e-4)


@partial(jax.jit, static_argnames="divergence")
def _bounds(student, unembed, teacher, weights, divergence):
    """The full divergence, and that over the outcomes for rising k."""
    tops = [top_k_of(teacher, unembed, k) for k in (1, 4, 32, VOCAB - 1, VOCAB)]
    coarse = [reference_kl(student, unembed, t, None, weights, divergence=divergence) for t in tops]
    fused = fused_kl(student, unembed, tops[-1], None, weights, divergence=divergence)
    full = reference_kl(student, unembed, teacher, None, weights, divergence=divergence)
    return full[0], [value for value, _ in coarse], fused[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 8.0), st.sampled_from(["forward", "reverse"]))
def test_it_is_a_lower_bound_that_rises_with_k_to_the_whole(seed, logit_std, divergence):
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in make_inputs(logit_std, seed)]
        full, values, fused = jax.tree.map(float, _bounds(*arrays, divergence))
    assert all(a <= b * (1 + 1e-12) for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == pytest.approx(full, rel=1e-10) and fused == pytest.approx(full, rel=1e-10)
    assert values[-2] == pytest.approx(full, rel=1e-10)  # the tail holds one token: nothing is lost


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_extreme_logits_stay_finite(divergence):
    student, unembed, teacher, weights = make_inputs(300.0)
    for k in (1, 8, VOCAB):
        top = top_k_of(teacher, unembed, k)
        assert jnp.isfinite(top.log_tail).all() or k == VOCAB
        value, grad = value_and_grad(fused_kl, divergence=divergence)(student, unembed, top, weights)
        assert jnp.isfinite(value) and value > 0 and jnp.isfinite(grad).all()
        same, grad = value_and_grad(fused_kl, divergence=divergence)(teacher, unembed, top, weights)
        assert abs(same) < 1e-4 and jnp.isfinite(grad).all()


def test_a_small_divergence_keeps_its_digits():
    arrays = make_inputs(near=0.01)
    student, unembed, teacher, weights = arrays
    value, _ = value_and_grad(fused_kl)(student, unembed, top_k_of(teacher, unembed, 16), weights)
    with jax.enable_x64(True):
        student, unembed, teacher, weights = (np.asarray(x, np.float64) for x in arrays)
        true, _ = value_and_grad(reference_kl)(student, unembed, top_k_of(teacher, unembed, 16), weights)
        true = np.asarray(true)
        assert true.dtype == jnp.float64 and true / weights.sum() < 1e-3
    assert off(value, true) <= 1e-4


def test_metrics_are_those_over_the_outcomes():
    student, unembed, teacher, weights = make_inputs()
    full = fused_metrics(student, unembed, teacher, None, weights)
    whole = fused_metrics(student, unembed, top_k_of(teacher, unembed, VOCAB), None, weights)
    for name, value in full.items():
        np.testing.assert_allclose(whole[name], value, rtol=1e-5)
    top = top_k_of(teacher, unembed, 8)
    few = fused_metrics(student, unembed, top, None, weights)
    assert few["agreement"] == full["agreement"] and few["kl"] < full["kl"]
    np.testing.assert_allclose(few["kl"], reference_kl(student, unembed, top, None, weights)[0], 1e-5)


def test_padding_counts_for_nothing_whatever_it_holds():
    student, unembed, teacher, weights = make_inputs()
    top = top_k_of(teacher, unembed, 8)
    value, grad = value_and_grad(fused_kl)(student, unembed, top, weights)
    more = [
        np.concatenate([x, np.full((5, *x.shape[1:]), bad, x.dtype)])
        for x, bad in zip(top, (-7, np.nan, np.inf), strict=True)
    ]
    padded = value_and_grad(fused_kl)(
        np.concatenate([student, np.full((5, WIDTH), np.nan, np.float32)]), unembed, TopK(*more),
        np.concatenate([weights, np.zeros(5, np.float32)]),
    )  # fmt: skip
    assert off(padded[0], value) <= 1e-6 and off(padded[1][:TOKENS], grad) <= 1e-6
    assert (padded[1][TOKENS:] == 0).all()


def test_no_logits_of_all_tokens_exist():
    student, unembed, teacher, weights = make_inputs()
    text = jax.jit(lambda h, u: top_k_of(h, u, 8, chunk_size=16)).lower(teacher, unembed).compile().as_text()
    top = top_k_of(teacher, unembed, 8)
    text += value_and_grad(fused_kl, chunk_size=16).lower(student, unembed, top, weights).compile().as_text()
    sizes = [int(rows) for rows in re.findall(rf"\[(\d+),{VOCAB}\]", text)]
    assert sizes and max(sizes) <= 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": np.zeros((TOKENS, 3), np.float32)}, "must be whole numbers"),
        ({"log_probs": np.zeros((TOKENS, 2), np.float32)}, r"log_probs \(60, 2\)"),
        ({"log_tail": np.zeros(7, np.float32)}, "teacher.log_tail is given for tokens"),
        ({"log_tail": np.zeros(TOKENS, np.int32)}, "teacher.log_tail is int32"),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    student, unembed, teacher, weights = make_inputs()
    top = top_k_of(teacher, unembed, 3)
    with pytest.raises(JaxbakeError, match=said):
        fused_kl(student, unembed, top._replace(**changes), None, weights)
    with pytest.raises(JaxbakeError, match="give one"):
        fused_kl(student, unembed, top, unembed, weights)
    with pytest.raises(JaxbakeError, match="of a teacher's top k"):
        fused_kl(student, unembed, top, None, weights, implementation="pallas")
    with pytest.raises(JaxbakeError, match="top_k: 204 of a vocabulary of 203"):
        top_k_of(teacher, unembed, 204)


def test_the_vocabulary_may_lie_in_parts():
    """Eight devices in a process of its own, each with a part of the vocabulary that the others' tokens are not in."""
    script = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxbake.objectives import fused_kl, fused_metrics, top_k_of
mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
keys = jax.random.split(jax.random.key(0), 3)
student, teacher = jax.random.normal(keys[0], (2, 8, 6, 16))
place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
for vocab in (96, 90):  # 90 does not divide: some parts are filled up
    unembed = jax.random.normal(keys[1], (vocab, 16))
    tops = jax.jit(lambda t, u: top_k_of(t, u, 20, chunk_size=8))
    step = jax.jit(jax.value_and_grad(lambda s, u, t: fused_kl(s, u, t, None, jnp.ones((8, 6)))[0]))
    measure = jax.jit(lambda s, u, t: fused_metrics(s, u, t, None, jnp.ones((8, 6))))
    there = place(unembed, "tp", "fsdp")
    top, top_ = tops(teacher, unembed), tops(place(teacher, "fsdp"), there)
    # Logs of probabilities: what counts is the absolute error, and one near 0 has few digits of its own.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), top_, top)
    (value, grad), (value_, grad_) = step(student, unembed, top), step(place(student, "fsdp"), there, top_)
    np.testing.assert_allclose(value_, value, rtol=1e-5)
    np.testing.assert_allclose(grad_, grad, rtol=1e-4, atol=1e-5)
    found = measure(place(student, "fsdp"), there, top_)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, measure(student, unembed, top))
print("agrees")
"""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]
