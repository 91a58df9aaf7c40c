"""The forward divergence from a teacher's moments: against the plain one in float64, and what it spares."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_top import TOKENS, VOCAB, WIDTH, make_inputs, value_and_grad

from jaxbake.bake import targets
from jaxbake.bake.many.loop import BakeSpec, bake_many
from jaxbake.bake.targets import Form, kept_form
from jaxbake.bench.flops import matmul_flops
from jaxbake.config import BakeConfig, LossConfig, TeacherConfig
from jaxbake.errors import JaxbakeError
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import Moments, fused_kl, fused_metrics, moments_of, reference_kl, tiles
from jaxbake.objectives import moments as module


def in_float64(inputs, temperature=1.0):
    with jax.enable_x64(True):
        reference = value_and_grad(reference_kl, temperature=temperature)
        return [np.asarray(x) for x in reference(*(np.asarray(x, np.float64) for x in inputs))]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("logit_std", [1.0, 6.0])
def test_agrees_with_a_float64_reference(logit_std, temperature):
    student, unembed, teacher, weights = inputs = make_inputs(logit_std)
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed), temperature=temperature)
    step = value_and_grad(fused_kl, temperature=temperature)
    value, grad = step(student, unembed, moments, weights)
    true_value, true_grad = in_float64(inputs, temperature)
    np.testing.assert_allclose(value, true_value, rtol=2e-6)
    assert np.linalg.norm(grad - true_grad) <= 2e-6 * np.linalg.norm(true_grad)
    alone = fused_kl(student, unembed, moments, None, weights, temperature=temperature)[0]
    np.testing.assert_allclose(alone, value, rtol=1e-6)


def test_in_float64_it_is_exact():
    student, unembed, teacher, weights = inputs = make_inputs()
    true_value, true_grad = in_float64(inputs)
    with jax.enable_x64(True):
        student, unembed, teacher, weights = (jnp.asarray(x, jnp.float64) for x in inputs)
        value, grad = value_and_grad(fused_kl)(student, unembed, moments_of(teacher, unembed), weights)
    np.testing.assert_allclose(value, true_value, rtol=1e-12)
    np.testing.assert_allclose(grad, true_grad, atol=1e-12 * np.abs(true_grad).max())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(1e-4, 1e-1), st.floats(0.5, 8.0))
def test_close_to_the_teacher_only_the_rounding_of_logits_is_lost(seed, near, logit_std):
    student, unembed, teacher, weights = inputs = make_inputs(logit_std, seed, near)
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))
    value, grad = value_and_grad(fused_kl)(student, unembed, moments, weights)
    true_value, true_grad = in_float64(inputs)
    rounding = np.finfo(np.float32).eps * np.abs(teacher @ unembed.T).max()
    assert abs(value - true_value) <= 2 * rounding * weights.sum()
    assert np.linalg.norm(grad - true_grad) <= 4 * rounding * np.linalg.norm(unembed, axis=1).max() * weights.sum()


def test_at_the_teacher_there_is_nothing_to_learn():
    _, unembed, teacher, weights = make_inputs()
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))
    value, grad = value_and_grad(fused_kl)(teacher, unembed, moments, weights)
    np.testing.assert_allclose(value, 0, atol=1e-4)
    np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_its_moments_are_those_of_its_distribution():
    _, unembed, teacher, _ = make_inputs()
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed), temperature=0.7)
    log_p = jax.nn.log_softmax(teacher @ unembed.T / 0.7)
    np.testing.assert_allclose(moments.mean, jnp.exp(log_p) @ unembed, atol=2e-6)
    np.testing.assert_allclose(moments.entropy, -jnp.sum(jnp.exp(log_p) * log_p, -1), atol=5e-6)


def test_tokens_of_no_weight_add_nothing_whatever_they_hold():
    student, unembed, teacher, weights = make_inputs()
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))
    step = value_and_grad(fused_kl)
    weights[::3] = 0
    value, grad = step(student, unembed, moments, weights)
    student[::3] = np.nan
    moments = Moments(*(x.at[::3].set(jnp.nan) for x in moments))
    again, grad_again = step(student, unembed, moments, weights)
    assert value == again
    np.testing.assert_array_equal(grad, grad_again)
    assert not np.asarray(grad[::3]).any()


def test_a_third_of_the_products_with_the_vocabulary_is_spared():
    student, unembed, teacher, weights = make_inputs()
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))
    step = value_and_grad(fused_kl, implementation="xla")
    product = 2 * TOKENS * VOCAB * WIDTH
    assert matmul_flops(step, student, unembed, teacher, weights) == 3 * product
    assert matmul_flops(step, student, unembed, moments, weights) == 2 * product


def test_no_more_than_a_tile_of_the_logits_is_held(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 32)
    student, unembed, teacher, weights = make_inputs()
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))
    text = value_and_grad(fused_kl).lower(student, unembed, moments, weights).compile().as_text()
    held = [int(size) for size in re.findall(rf"\[{TOKENS},(\d+)\]", text)]
    assert max(held) <= 48
    assert VOCAB not in held


def test_tokens_come_in_chunks(monkeypatch):
    student, unembed, teacher, weights = make_inputs()
    step, given = value_and_grad(fused_kl, chunk_size=1), (jnp.asarray(teacher), jnp.asarray(unembed))
    whole = moments_of(*given)
    value, grad = step(student, unembed, whole, weights)
    monkeypatch.setattr(module, "MOST_TOKENS", 7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moments_of(*given), whole)
    again = value_and_grad(fused_kl, chunk_size=1)
    text = again.lower(student, unembed, whole, weights).compile().as_text()
    assert f"[7,{VOCAB}]" in text or f"[6,{VOCAB}]" in text
    assert f"[{TOKENS},{VOCAB}]" not in text
    apart = again(student, unembed, whole, weights)
    np.testing.assert_allclose(apart[0], value, rtol=1e-6)
    np.testing.assert_allclose(apart[1], grad, atol=1e-6)


def test_tiles_of_any_vocabulary(monkeypatch):
    student, unembed, teacher, weights = inputs = make_inputs(5.0)
    true_value, true_grad = in_float64(inputs)
    for rows in (1, 13, 29, 50):
        monkeypatch.setattr(tiles, "ROWS", rows)
        moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))
        value, grad = value_and_grad(fused_kl)(student, unembed, moments, weights)
        np.testing.assert_allclose(value, true_value, rtol=2e-6)
        assert np.linalg.norm(grad - true_grad) <= 2e-6 * np.linalg.norm(true_grad)
    for vocab in (1, 50_257, 32_000, 128_256, 151_936, 262_144):
        count, size = tiles.cut(vocab)
        assert (count - 1) * size < vocab <= count * size


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"mean": np.zeros((TOKENS, 3), np.float32)}, {}, r"teacher.mean is \(60, 3\); it must be \(60, 16\)"),
        ({"entropy": np.zeros(7, np.float32)}, {}, "teacher.entropy is given for tokens"),
        ({"entropy": np.zeros(TOKENS, np.int32)}, {}, "teacher.entropy is int32"),
        ({}, {"divergence": "reverse"}, "moments do not determine divergence 'reverse'"),
        ({}, {"softcap": 30.0}, "moments do not determine a soft cap"),
        ({}, {"implementation": "pallas"}, "of a teacher's moments"),
    ],
)
def test_what_does_not_fit_is_named(changes, options, said):
    student, unembed, teacher, weights = make_inputs()
    moments = moments_of(jnp.asarray(teacher), jnp.asarray(unembed))._replace(**changes)
    with pytest.raises(JaxbakeError, match=said):
        fused_kl(student, unembed, moments, None, weights, **options)


def test_low_precision_and_held_out_figures_need_the_hidden_states():
    student, unembed, teacher, weights = (jnp.asarray(x) for x in make_inputs())
    moments = moments_of(teacher, unembed)
    with pytest.raises(JaxbakeError, match="need the student in float32"):
        fused_kl(student.astype(jnp.bfloat16), unembed, moments, None, weights)
    with pytest.raises(JaxbakeError, match="moments need float32"):
        moments_of(teacher.astype(jnp.bfloat16), unembed)
    for measure in (fused_metrics, reference_kl):
        with pytest.raises(JaxbakeError, match="give the hidden states"):
            measure(student, unembed, moments, None, weights)


# In a bake


@pytest.fixture
def from_the_first_token(monkeypatch):
    """Vocabularies of any size are large enough."""
    monkeypatch.setattr(targets, "MOMENTS_FROM", 1)


def same_course(got, want):
    assert [row["step"] for row in got.metrics] == [row["step"] for row in want.metrics]
    for a, b in zip(got.metrics, want.metrics, strict=True):
        for name in {"loss", "held_out_kl"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_a_bake_takes_the_same_course(from_the_first_token, monkeypatch, tmp_path):
    """On the device, from a file, and as it does from hidden states."""
    got, filed = tiny.tiny_bake(), tmp_path / "filed"
    on_disk = tiny.with_train(teacher_device_gb=0, teacher_host_gb=0)
    again = tiny.tiny_bake(filed, on_disk)
    assert (filed / "teacher" / "teacher.bin").stat().st_size % (4 * (tiny.tiny_base().config.hidden_size + 1)) == 0
    same_course(again, got)
    monkeypatch.setattr(targets, "MOMENTS_FROM", 10**9)
    same_course(got, tiny.tiny_bake())


def test_many_bakes_come_out_as_alone(from_the_first_token):
    prompts = [tiny.PROMPT, "Be a king."]
    given = {"pins": tiny.PINS, "contexts": tiny.CONTEXTS}
    specs = [BakeSpec(str(n), prompt, tiny.STIMULI, tiny.CONFIG, **given) for n, prompt in enumerate(prompts)]
    for got, prompt in zip(bake_many(tiny.tiny_base(), specs), prompts, strict=True):
        want = tiny.tiny_bake(None, tiny.CONFIG, prompt=prompt)
        same_course(got, want)
        for a, b in zip(jax.tree.leaves(got.delta), jax.tree.leaves(want.delta), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_which_form_is_kept():
    small = {"family": "llama", "vocab_size": 4096, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1}
    small |= {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "max_positions": 8}
    plain, capped = ModelConfig(**small), ModelConfig(**small, logit_softcap=30.0)
    warm = BakeConfig(loss=LossConfig(temperature=2.0))
    assert kept_form(warm, plain, jnp.float32) == Form(moments=True, temperature=2.0)
    assert kept_form(warm, replace(plain, vocab_size=4095), jnp.float32) == Form()
    assert kept_form(warm, plain, jnp.bfloat16) == kept_form(warm, capped, jnp.float32) == Form()
    assert kept_form(BakeConfig(loss=LossConfig(divergence="reverse")), plain, jnp.float32) == Form()
    for implementation in ("xla", "tiled", "pallas"):  # the kernels take hidden states
        assert kept_form(BakeConfig(loss=LossConfig(implementation=implementation)), plain, jnp.float32) == Form()
    top = BakeConfig(teacher=TeacherConfig(top_k=5))
    assert kept_form(top, plain, jnp.float32) == Form(top_k=5)
    assert kept_form(BakeConfig(), plain, jnp.float32, other=True).top_k
