"""The low-rank delta as a pytree: what it changes, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbake.config import LoraConfig
from jaxbake.deltas.lora import Delta, check_fits, delta_digest, init_delta, merge, target_slots, with_strength
from jaxbake.errors import JaxbakeError
from jaxbake.models import decoder
from jaxbake.models.spec import linear_shapes

LORA = LoraConfig(rank=4, alpha=6.0)
forward = jax.jit(decoder.forward, static_argnames="config")
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)


def random_delta(config, lora=LORA, size=0.3) -> Delta:
    rng, factors, n, r = np.random.default_rng(1), {}, config.num_layers, lora.rank
    for slot in target_slots(config, lora):
        (size_in, _), (size_out, _) = linear_shapes(config)[slot]
        a, b = (size * rng.standard_normal(shape, np.float32) for shape in ((n, size_in, r), (n, r, size_out)))
        factors[slot] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return Delta(factors, jnp.float32(lora.scale), lora)


@pytest.mark.parametrize("init", ["a_random", "b_random"])
@pytest.mark.parametrize("rslora", [False, True])
def test_fresh_delta_changes_nothing_bitwise(tiny_config, tiny_params, init, rslora):
    lora = LoraConfig(rank=4, alpha=8.0, init=init, rslora=rslora)
    delta = init_delta(jax.random.key(0), tiny_config, lora)
    random, zero = ("a", "b") if init == "a_random" else ("b", "a")
    for factor in delta.factors.values():
        assert not factor[zero].any() and factor[random].any()
    base = forward(tiny_params, None, TOKENS, config=tiny_config)
    np.testing.assert_array_equal(forward(tiny_params, delta, TOKENS, config=tiny_config), base)


@pytest.mark.parametrize("init", ["a_random", "b_random"])
def test_init_bounds_and_independence(tiny_config, init):
    delta = init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=4, alpha=8.0, init=init))
    shapes = linear_shapes(tiny_config)
    for slot, factor in delta.factors.items():
        (size_in, _), (size_out, _) = shapes[slot]
        assert factor["a"].shape == (tiny_config.num_layers, size_in, 4)
        assert factor["b"].shape == (tiny_config.num_layers, 4, size_out)
        x, bound = (factor["a"], size_in**-0.5) if init == "a_random" else (factor["b"], 4**-0.5)
        assert 0.8 * bound < jnp.abs(x).max() <= bound
        assert not jnp.array_equal(x[0], x[1])  # layers drawn apart
    name = "a" if init == "a_random" else "b"
    gate, up = delta.factors["gate_proj"][name], delta.factors["up_proj"][name]
    assert not jnp.array_equal(gate, up)  # slots of one shape drawn apart


def test_scale_is_alpha_over_rank_or_its_root(tiny_config):
    plain = init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=9, alpha=6.0, targets=("q_proj",)))
    stable = init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=9, alpha=6.0, targets=("q_proj",), rslora=True))
    assert plain.scale == np.float32(6 / 9) and plain.scale.dtype == jnp.float32
    assert stable.scale == np.float32(6 / 3)


def test_scale_reaches_the_forward(tiny_config, tiny_params):
    """rsLoRA with alpha 6 and rank 4 is plain LoRA with alpha 12."""
    stable = random_delta(tiny_config, LoraConfig(rank=4, alpha=6.0, rslora=True))
    plain = random_delta(tiny_config, LoraConfig(rank=4, alpha=12.0))
    weak = random_delta(tiny_config, LoraConfig(rank=4, alpha=6.0))
    out = [np.asarray(forward(tiny_params, d, TOKENS, config=tiny_config)) for d in (stable, plain, weak)]
    np.testing.assert_array_equal(out[0], out[1])
    assert np.abs(out[0] - out[2]).max() > 1e-2


@pytest.mark.parametrize("targets", ["all", ("q_proj", "down_proj")])
def test_merge_equals_forward_with_delta(tiny_config, tiny_params, targets):
    delta = random_delta(tiny_config, LoraConfig(rank=4, alpha=6.0, targets=targets))
    with_delta = np.asarray(forward(tiny_params, delta, TOKENS, config=tiny_config))
    merged = np.asarray(forward(merge(tiny_params, delta), None, TOKENS, config=tiny_config))
    base = np.asarray(forward(tiny_params, None, TOKENS, config=tiny_config))
    assert np.abs(with_delta - base).max() > 0.1
    assert np.abs(with_delta - merged).max() <= 1e-5 * np.abs(with_delta).max()


def test_merge_leaves_the_rest_alone_and_keeps_dtypes(tiny_config, tiny_params):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    delta = random_delta(tiny_config, LoraConfig(rank=4, alpha=6.0, targets=("q_proj",)))
    merged = merge(params, delta)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    for name in params["layers"]:
        same = jnp.array_equal(merged["layers"][name], params["layers"][name])
        assert same == (name != "q_proj")
    exact = params["layers"]["q_proj"].astype(jnp.float32) + delta.scale * jnp.einsum(
        "lir,lro->lio", delta.factors["q_proj"]["a"], delta.factors["q_proj"]["b"], precision="highest"
    )  # rounded once, at the end
    np.testing.assert_array_equal(merged["layers"]["q_proj"], exact.astype(jnp.bfloat16))


def test_merge_of_low_precision_factors_computes_in_float32(tiny_config, tiny_params):
    delta = random_delta(tiny_config)
    low = delta.replace(factors=jax.tree.map(lambda x: x.astype(jnp.bfloat16), delta.factors))
    back = low.replace(factors=jax.tree.map(lambda x: x.astype(jnp.float32), low.factors))
    for x, y in zip(jax.tree.leaves(merge(tiny_params, low)), jax.tree.leaves(merge(tiny_params, back)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_strength_interpolates(tiny_config, tiny_params):
    delta = random_delta(tiny_config)
    half = with_strength(delta, 0.5)
    np.testing.assert_array_equal(half.scale, delta.scale * 0.5)
    full_change = merge(tiny_params, delta)["layers"]["up_proj"] - tiny_params["layers"]["up_proj"]
    half_change = merge(tiny_params, half)["layers"]["up_proj"] - tiny_params["layers"]["up_proj"]
    np.testing.assert_allclose(half_change, 0.5 * full_change, atol=1e-6)
    base = forward(tiny_params, None, TOKENS, config=tiny_config)
    np.testing.assert_array_equal(forward(tiny_params, with_strength(delta, 0), TOKENS, config=tiny_config), base)
    out = forward(tiny_params, half, TOKENS, config=tiny_config)
    assert jnp.abs(out - base).max() > 1e-2
    assert jnp.abs(out - forward(tiny_params, delta, TOKENS, config=tiny_config)).max() > 1e-2


def test_delta_holds_no_base_arrays(tiny_config, tiny_params):
    delta = init_delta(jax.random.key(0), tiny_config, LORA)
    shapes = [x.shape for x in jax.tree.leaves(delta)]
    base = {x.shape for x in jax.tree.leaves(tiny_params)}
    assert not base & set(shapes)
    sizes = linear_shapes(tiny_config).values()
    rank, layers = 4, tiny_config.num_layers
    expected = sum(layers * rank * (i + o) for (i, _), (o, _) in sizes) + 1
    assert sum(x.size for x in jax.tree.leaves(delta)) == expected


def test_targets_are_all_or_in_model_order(tiny_config):
    assert target_slots(tiny_config, LoraConfig()) == tuple(linear_shapes(tiny_config))
    assert target_slots(tiny_config, LoraConfig(targets=("down_proj", "q_proj"))) == ("q_proj", "down_proj")
    delta = init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=4, targets=("v_proj",)))
    assert set(delta.factors) == {"v_proj"}


def test_bad_settings_are_named(tiny_config):
    with pytest.raises(JaxbakeError, match="lora.rank: 0"):
        LoraConfig(rank=0)
    with pytest.raises(JaxbakeError, match="lora.alpha"):
        LoraConfig(alpha=0.0)
    with pytest.raises(JaxbakeError, match=r"lora.rank: 25 is larger than layer 'q_proj' \(24 x 48\).*at most 24"):
        init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=25))
    with pytest.raises(JaxbakeError, match="no linear layer 'query_proj'; did you mean 'q_proj'"):
        init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=2, targets=("query_proj",)))
    with pytest.raises(JaxbakeError, match=r"'q_proj' must be 'all' or a list"):
        init_delta(jax.random.key(0), tiny_config, LoraConfig(rank=2, targets="q_proj"))


def test_digest_tells_every_bit(tiny_config):
    delta = random_delta(tiny_config)
    digest = delta_digest(delta)
    assert digest == delta_digest(random_delta(tiny_config)) and len(digest) == 64
    assert digest != delta_digest(with_strength(delta, 0.5))
    a = delta.factors["q_proj"]["a"]
    nudged = {
        **delta.factors,
        "q_proj": {**delta.factors["q_proj"], "a": a.at[0, 0, 0].set(jnp.nextafter(a[0, 0, 0], 9))},
    }
    swapped = {**delta.factors, "gate_proj": delta.factors["up_proj"], "up_proj": delta.factors["gate_proj"]}
    assert len({digest, *(delta_digest(delta.replace(factors=f)) for f in (nudged, swapped))}) == 3


def test_check_fits_lists_what_does_not(tiny_config):
    delta = random_delta(tiny_config)
    check_fits(delta, tiny_config, "here")
    wrong = {
        **delta.factors,
        "v_proj": {"a": delta.factors["v_proj"]["a"][:1], "b": delta.factors["v_proj"]["b"]},
        "qkv_proj": delta.factors["q_proj"],
    }
    with pytest.raises(JaxbakeError) as error:
        check_fits(delta.replace(factors=wrong), tiny_config, "here")
    assert "here: does not fit" in str(error.value)
    assert "v_proj A is [1, 24, 4], must be [2, 24, 4]" in str(error.value)
    assert "'qkv_proj' is no linear layer" in str(error.value)
