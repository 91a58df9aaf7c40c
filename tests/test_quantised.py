"""A base held as small integers: what they stand for, what it costs, and that a bake over it is a bake."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base as tiny
from tiny_hf import save_tiny
from typer.testing import CliRunner

import jaxbake as jb
from jaxbake.bake.abstract import params_inputs
from jaxbake.bake.quantisation import quantisation_report
from jaxbake.cli import app
from jaxbake.errors import JaxbakeError
from jaxbake.mesh import AXES
from jaxbake.models import checkpoint
from jaxbake.models.decoder import forward
from jaxbake.models.linear import linear
from jaxbake.models.quantised import Quantised, dequantised, group_size, integers, quantise
from jaxbake.models.spec import ModelConfig, abstract_params, init_params, linear_shapes
from jaxbake.recipe import parse_recipe

CONFIG = ModelConfig(
    family="llama", vocab_size=262, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, max_positions=160, tie_embeddings=True, init_range=0.2,
)  # fmt: skip
HF = {
    "model_type": "llama", "vocab_size": 262, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 160,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny chat model on disk."""
    path = tmp_path_factory.mktemp("model")
    checkpoint.write_params(init_params(jax.random.key(5), CONFIG), CONFIG, path, HF)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["int8", "int4"])
def kind(request):
    return request.param


def weight(size_in=96, size_out=40):
    return np.random.default_rng(0).normal(size=(size_in, size_out)).astype(np.float32)


def test_the_integers_are_the_nearest(kind):
    w = weight()
    q = quantise(w, kind)
    low, high, step = (-127, 127, q.scales) if kind == "int8" else (-8, 7, np.repeat(q.scales, 32, axis=0))
    whole = np.asarray(integers(q, jnp.float32))
    assert np.abs(whole).max() == -low and np.all(whole == np.clip(np.rint(w / step), low, high))
    np.testing.assert_allclose(dequantised(q), whole * step, rtol=1e-6)
    if kind == "int8":
        np.testing.assert_allclose(step, np.abs(w).max(0) / 127, rtol=1e-6)
    assert q.kind == kind


def plain_int4(weight_IO, kind):
    """int4 whose largest weight becomes 7, as a dequantised weight: what the search for scales is measured against."""
    grouped = weight_IO.reshape(*weight_IO.shape[:-2], -1, group_size(weight_IO.shape[-2]), weight_IO.shape[-1])
    step = np.abs(grouped).max(-2, keepdims=True) / 7
    return (np.rint(grouped / np.where(step > 0, step, 1)) * step).reshape(weight_IO.shape)


def test_searched_scales_leave_less_error_in_every_group():
    w = np.random.default_rng(1).standard_t(5, size=(3, 256, 64)).astype(np.float32)
    w[1, :128, 3] = 0

    def error(found):
        return ((np.asarray(found) - w).reshape(3, 2, 128, 64) ** 2).sum(2)

    plain, searched = error(plain_int4(w, "int4")), error(dequantised(quantise(w, "int4")))
    assert np.all(searched <= plain * (1 + 1e-5)) and searched.sum() < 0.75 * plain.sum()
    groups = w.reshape(3, 2, 128, 64)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(2)[:, :, None], 2) / -8
    for part in np.linspace(0.6, 1.1, 11):  # no one part of the peak is as good for all groups
        step = np.where(peak == 0, 1, peak * part)
        assert searched.sum() < error((np.clip(np.rint(groups / step), -8, 7) * step).reshape(w.shape)).sum()


def test_searched_scales_leave_less_divergence(folder, monkeypatch):
    texts = ["Where is the harbour?", "Say hello.", "A longer question about nothing in particular, please."]
    searched = quantisation_report(folder, "int4", texts)
    monkeypatch.setattr("jaxbake.models.quantised.quantise", plain_int4)
    plain = quantisation_report(folder, "int4", texts)
    assert 0 < searched.kl < 0.85 * plain.kl


def test_a_layer_of_zeros_stays_zero(kind):
    assert np.all(np.asarray(dequantised(quantise(np.zeros((4, 2), np.float32), kind))) == 0)


@pytest.mark.parametrize("size, group", [(4096, 128), (14336, 128), (576, 64), (24, 8), (50, 2)])
def test_groups_divide_the_input(size, group):
    assert group_size(size) == group


def test_int4_of_an_odd_input_is_refused():
    with pytest.raises(JaxbakeError, match="45 inputs needs int8"):
        quantise(weight(45), "int4")


@pytest.mark.parametrize("dtype, close", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_linear_is_the_product_with_what_the_integers_stand_for(kind, dtype, close):
    q = jax.tree.map(jnp.asarray, quantise(weight(), kind))
    x = jax.random.normal(jax.random.key(0), (2, 3, 96), dtype)
    g = jax.random.normal(jax.random.key(1), (2, 3, 40), dtype)

    def run(w):
        y, pull = jax.vjp(lambda x: linear(x, {"w": w}, "w"), x)
        return y, pull(g)[0]

    for got, want in zip(run(q), run(dequantised(q)), strict=True):
        assert got.dtype == want.dtype == dtype
        scale = float(jnp.abs(want.astype(jnp.float32)).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=close * scale)


def test_the_backward_pass_keeps_integers_not_floats(kind):
    """What is kept between the passes must not be the float weights of all layers."""
    config = replace(CONFIG, hidden_size=128, intermediate_size=512, num_layers=6)
    lora = jb.LoraConfig(rank=1, targets=("q_proj",))
    shapes = [abstract_params(config, quantize=q) for q in (kind, None)]
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    delta = jax.eval_shape(lambda key: jb.init_delta(key, config, lora), jax.random.key(0))

    def loss(factors, delta, params, tokens):
        return forward(params, delta.replace(factors=factors), tokens, config=config).sum()

    used = jax.jit(jax.grad(loss)).lower(delta.factors, delta, shapes[0], tokens).compile().memory_analysis()
    floats = 4 * sum(math.prod(shapes[1]["layers"][slot].shape) for slot in linear_shapes(config))
    assert used.temp_size_in_bytes < floats / 2  # a layer's at a time


def test_memory_is_as_promised(kind, folder):
    base, original = jb.load(folder, quantize=kind), jb.load(folder)
    for slot in linear_shapes(CONFIG):
        held, floats = base.params["layers"][slot], original.params["layers"][slot]
        assert isinstance(held, Quantised)
        n, size_in, size_out = floats.shape
        scales = 4 * n * size_out * (1 if kind == "int8" else size_in // group_size(size_in))
        assert sum(x.nbytes for x in jax.tree.leaves(held)) == floats.nbytes // (4 if kind == "int8" else 8) + scales
    others = set(base.params["layers"]) - set(linear_shapes(CONFIG))
    assert others and all(base.params["layers"][name].dtype == jnp.float32 for name in others)
    assert base.params["embed_tokens"].dtype == jnp.float32
    described = abstract_params(CONFIG, quantize=kind)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), base.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), described
    )


def test_read_from_disk_as_quantised_in_memory(kind, folder):
    base, original = jb.load(folder, quantize=kind), jb.load(folder)
    for slot in linear_shapes(CONFIG):
        want = quantise(np.asarray(original.params["layers"][slot]), kind)
        jax.tree.map(np.testing.assert_array_equal, base.params["layers"][slot], want)
    assert base.digest == original.digest and base.quantize == kind


def test_logits_stay_near(folder):
    tokens = np.random.default_rng(1).integers(6, 262, (3, 20))
    fine, coarse, want = (np.asarray(jb.logits(jb.load(folder, quantize=q), tokens)) for q in ("int8", "int4", None))
    spread = np.sqrt(np.mean((want - want.mean(-1, keepdims=True)) ** 2))
    errors = [np.sqrt(np.mean((got - want) ** 2)) / spread for got in (fine, coarse)]
    assert 0 < errors[0] < 0.03
    assert 10 < errors[1] / errors[0] < 25  # a step is 127 / 7 = 18 times as wide, less the gain of groups


def test_the_report_is_the_divergence_of_the_whole_models(kind, folder):
    texts = ["who is he?", "where is tom?", "what"]
    report = jb.quantisation_report(folder, kind, texts)
    ours, theirs = jb.load(folder, quantize=kind), jb.load(folder)
    kl = agreement = count = 0
    for text in texts:
        ids = np.asarray(tiny.tokenizer().apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        ))[None]  # fmt: skip
        q, p = (jax.nn.log_softmax(jb.logits(base, ids)[0]) for base in (ours, theirs))
        kl += float(jnp.sum(jnp.exp(p) * (p - q)))
        agreement += int(jnp.sum(p.argmax(-1) == q.argmax(-1)))
        count += ids.shape[1]
    assert report.tokens == count
    np.testing.assert_allclose([report.kl, report.agreement], [kl / count, agreement / count], rtol=1e-3)
    assert 0 < report.kl < (0.01 if kind == "int8" else 1)
    assert report.bytes == sum(x.nbytes for x in jax.tree.leaves(ours.params))
    assert report.original_bytes == sum(x.nbytes for x in jax.tree.leaves(theirs.params))


def test_the_command_prints_both(folder, tmp_path):
    (tmp_path / "texts").write_text("who is he?\n\nwhat\n")
    done = CliRunner().invoke(app, ["quantize-report", str(folder), "--texts", str(tmp_path / "texts"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["kind"] for row in rows] == ["int8", "int4"] and rows[0]["kl"] < rows[1]["kl"]


def test_an_unknown_kind_is_named(folder):
    with pytest.raises(JaxbakeError, match="quantize: 'int9' is unknown; did you mean 'int"):
        jb.load(folder, quantize="int9")
    recipe = "name: a\nprompt: b\nquantize: %s\n"
    assert parse_recipe(recipe % "int4").quantize == "int4"
    with pytest.raises(JaxbakeError, match="quantize: should be"):
        parse_recipe(recipe % "int3")


def test_it_lies_on_a_mesh_as_the_weights_do(folder, kind):
    mesh = jax.make_mesh((1,) * len(AXES), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    base, plain = jb.load(folder, quantize=kind, mesh=mesh), jb.load(folder, quantize=kind)
    jax.tree.map(np.testing.assert_array_equal, base.params, plain.params)
    described = params_inputs(CONFIG, mesh, jnp.float32, kind)
    for got, want in zip(jax.tree.leaves(base.params), jax.tree.leaves(described), strict=True):
        assert (got.shape, got.dtype, got.sharding) == (want.shape, want.dtype, want.sharding)


@pytest.fixture(scope="module")
def baked(folder, tmp_path_factory):
    base = jb.load(folder, quantize="int8")
    return base, tiny.tiny_bake(tmp_path_factory.mktemp("baked") / "sailor", base=base)


def test_a_bake_over_integers_lowers_the_divergence(baked):
    base, result = baked
    assert result.kl_after < 0.7 * result.kl_before
    assert result.card.quantize == "int8" and "| base held as | int8 |" in result.card.to_markdown()
    assert 0 < result.card.metrics["quantised_kl"] < 0.01
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result.delta.factors))


def test_its_folder_is_no_other_bakes(baked, folder):
    _, result = baked
    with pytest.raises(JaxbakeError, match="holds another bake.*quantize"):
        tiny.tiny_bake(result.output, base=jb.load(folder))


def test_its_delta_goes_to_peft_and_says_what_it_was_trained_on(baked, folder, tmp_path):
    base, result = baked
    jb.save_peft(result.delta, base, tmp_path / "peft", card=result.card)
    assert "| base held as | int8 |" in (tmp_path / "peft" / "README.md").read_text()
    back = jb.load_peft(tmp_path / "peft", jb.load(folder))
    jax.tree.map(np.testing.assert_array_equal, back.factors, result.delta.factors)


def test_merged_it_goes_into_the_original_weights(baked, folder, tmp_path):
    base, result = baked
    with pytest.raises(JaxbakeError, match="held as int8.*save_merged"):
        jb.merge(base, result.delta)
    jb.save_merged(base, result.delta, tmp_path / "merged", card=result.card)
    merged, want = jb.load(tmp_path / "merged"), jb.merge(jb.load(folder), result.delta)
    jax.tree.map(np.testing.assert_array_equal, merged.params, want.params)
    readme = (tmp_path / "merged" / "README.md").read_text()
    assert re.search(r"held as int8; here it is added to the original\s+weights", readme)


@pytest.mark.parametrize("family", ["phi3", "gemma3_multimodal"])
def test_families_with_fused_layers_and_windows(family, tmp_path):
    save_tiny(family, tmp_path)
    tokens = np.random.default_rng(1).integers(3, 64, (2, 9))
    got, want = (np.asarray(jb.logits(jb.load(tmp_path, quantize=q), tokens)) for q in ("int8", None))
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
