"""What must hold on meshes of eight devices: run in a process of its own by `test_sharded.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxbake import mesh as meshes
from jaxbake.bake.abstract import put_batch, state_inputs
from jaxbake.bake.step import init_state, make_bake_step
from jaxbake.config import BakeConfig, LoraConfig, LossConfig, OptimizerConfig, TrainConfig
from jaxbake.data.batches import Batch, View
from jaxbake.models.decoder import prefix_from
from jaxbake.models.spec import ModelConfig, init_params, is_param, param_specs

MESHES = ["fsdp=8", "fsdp=4,tp=2", "fsdp=2,tp=4", "tp=8", "replica=2,fsdp=2,tp=2"]

CONFIG = ModelConfig(
    family="llama", vocab_size=104, hidden_size=48, intermediate_size=56, num_layers=3, num_heads=8, num_kv_heads=2,
    head_dim=12, max_positions=128, tie_embeddings=False, init_range=0.2,
)  # fmt: skip
PROMPT = np.arange(5, 13, dtype=np.int32)


def bake_config(**changes) -> BakeConfig:
    config = BakeConfig(
        lora=LoraConfig(rank=3, alpha=6.0),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
        train=TrainConfig(steps=20),
    )
    return replace(config, **changes)


def make_batch(rows: int = 8, length: int = 16, seed: int = 0, vocab: int = 104) -> Batch:
    """Packed rows of two examples each, the teacher's behind the prompt; matched tokens and padding differ by row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, vocab, (rows, length)).astype(np.int32)
    half = length // 2 - 1
    segments = np.repeat([[1] * half + [2] * (length - half - 2) + [0] * 2], rows, 0).astype(np.int32)
    positions = np.repeat([[*range(half), *range(length - half - 2), 0, 0]], rows, 0).astype(np.int32)
    index = np.repeat([[2, 3, 4, half + 2, half + 3]], rows, 0).astype(np.int32)
    weights = (np.arange(5)[None] <= np.arange(rows)[:, None]).astype(np.float32)
    hidden = np.where(segments > 0, len(PROMPT), 0).astype(np.int32)
    student = View(tokens, positions, segments, np.zeros_like(tokens), index)
    teacher = View(tokens, positions + hidden, segments, hidden, index)
    source = np.where(weights > 0, np.arange(index.size).reshape(index.shape), -1).astype(np.int32)
    return Batch(student, teacher, np.take_along_axis(tokens, index + 1, 1), weights, source)


@lru_cache
def params_of(config: ModelConfig):
    return jax.tree.map(np.asarray, jax.jit(init_params, static_argnums=1)(jax.random.key(3), config))


def on(mesh, params, config):
    specs = param_specs(config)
    return jax.tree.map(lambda p, x: meshes.put(x, p.axes, mesh), specs, params, is_leaf=is_param)


@lru_cache
def _step(config, settings):
    return make_bake_step(config, settings)


def ten_steps(mesh, config=CONFIG, settings=None, steps=10, rows=8, length=16):
    """Loss and gradient norm of the first step, and the delta after all of them."""
    settings = settings or bake_config()
    params = params_of(config)
    if mesh is not None:
        params = on(mesh, params, config)
    lies = mesh and jax.tree.map(lambda x: x.sharding, state_inputs(config, settings, mesh))
    state = init_state(jax.random.key(0), config, settings, lies)
    prefix = jax.jit(lambda p: prefix_from(p, None, jnp.asarray(PROMPT), config=config))(params)
    step, first = _step(config, settings), None
    for n in range(steps):
        batch = put_batch(make_batch(rows, length, n % 2, config.vocab_size), mesh)
        state, metrics = step(state, params, batch, prefix)
        first = first or {name: float(value) for name, value in metrics.items()}
    return first, jax.tree.map(np.asarray, state.delta.factors)


@lru_cache
def alone(config=CONFIG, settings=None, **sizes):
    return ten_steps(None, config, settings, **sizes)


def check_same(mesh, config=CONFIG, settings=None, **sizes):
    first, factors = alone(config, settings, **sizes)
    first_, factors_ = ten_steps(mesh, config, settings, **sizes)
    for name in ("loss", "grad_norm", "tokens"):
        assert first_[name] == pytest.approx(first[name], rel=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), factors_, factors)


@pytest.mark.parametrize("text", MESHES)
def test_ten_steps_are_those_of_one_device(text):
    check_same(meshes.make_mesh(text))


def test_the_order_of_the_devices_does_not_matter():
    """A person's own mesh: other devices first, axes in another order, of jax's default axis type."""
    shuffled = np.array(jax.devices())[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(2, 4)
    mesh = meshes.resolve(Mesh(shuffled, ("model", "fsdp")), CONFIG, names={"model": "tp"})
    assert meshes.parts("batch", mesh) == 4 and meshes.parts("heads", mesh) == 2
    check_same(mesh)


GEMMA = ModelConfig(
    family="gemma2", vocab_size=102, hidden_size=24, intermediate_size=42, num_layers=3, num_heads=6, num_kv_heads=3,
    head_dim=10, max_positions=128, tie_embeddings=True, init_range=0.2, norm_placement="sandwich", norm_offset=1.0,
    activation="gelu_tanh", attention_softcap=20.0, logit_softcap=10.0, windows=(5, 0, 5), qk_norm="head",
)  # fmt: skip


@pytest.mark.parametrize("text", ["fsdp=4,tp=2", "replica=4,tp=2", "fsdp=2,context=2,tp=2"])
def test_odd_shapes_windows_and_soft_caps(text):
    """51 tokens of the vocabulary on each half of tp do not divide by 4, nor 3 key heads by 2; two micro-batches."""
    settings = bake_config(optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0, accumulate=2))
    check_same(meshes.make_mesh(text), GEMMA, replace(settings, loss=LossConfig(chunk_size=3)), steps=4)


def test_fused_projections_and_recomputation():
    config = replace(CONFIG, family="phi3", fused_projections=True, num_kv_heads=4)
    settings = bake_config(train=TrainConfig(steps=20, remat=True))
    check_same(meshes.make_mesh("fsdp=4,tp=2"), config, settings, steps=3)


@pytest.mark.parametrize("text", ["context=8", "fsdp=2,context=4"])
def test_rows_split_by_tokens(text):
    check_same(meshes.make_mesh(text), replace(CONFIG, windows=(7, 0, 7)), steps=4)
