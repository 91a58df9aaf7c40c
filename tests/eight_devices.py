"""What must hold on meshes of eight devices: run in a process of its own by `test_sharded.py`."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxbake as jb
from jaxbake import mesh as meshes
from jaxbake.bake.abstract import params_inputs, put_batch, state_inputs, step_inputs
from jaxbake.bake.step import init_state, make_bake_step
from jaxbake.config import BakeConfig, LoraConfig, LossConfig, OptimizerConfig, TrainConfig
from jaxbake.data.batches import Batch, View
from jaxbake.data.shapes import Shape
from jaxbake.models.base import on_mesh, put_params
from jaxbake.models.decoder import prefix_from
from jaxbake.models.spec import ModelConfig, init_params
from jaxbake.objectives import fused_kl, fused_metrics, moments_of
from jaxbake.sampling import engine, filters

MESHES = ["fsdp=8", "fsdp=4,tp=2", "fsdp=2,tp=4", "tp=8", "replica=2,fsdp=2,tp=2"]

CONFIG = ModelConfig(  # sizes of which no two are equal, nor a part of another: an array shows what it is of
    family="llama", vocab_size=1304, hidden_size=272, intermediate_size=464, num_layers=3, num_heads=8, num_kv_heads=2,
    head_dim=12, max_positions=128, tie_embeddings=False, init_range=0.08,
)  # fmt: skip
PROMPT = np.arange(5, 13, dtype=np.int32)


ADAM = OptimizerConfig(learning_rate=1e-2, warmup=0.0, eps=1e-4)  # rounding is not made whole steps of


def bake_config(**changes) -> BakeConfig:
    config = BakeConfig(
        lora=LoraConfig(rank=3, alpha=6.0),
        optimizer=ADAM,
        train=TrainConfig(steps=20),
    )
    return replace(config, **changes)


def make_batch(rows: int = 8, length: int = 16, seed: int = 0, vocab: int = CONFIG.vocab_size) -> Batch:
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
    return put_params(params, config, mesh)


def ten_steps(mesh, config=CONFIG, settings=None, steps=10):
    """Metrics of the first step, the delta after all of them, and the compiled step."""
    settings = settings or bake_config()
    params = params_of(config)
    if mesh is not None:
        params = on(mesh, params, config)
    lies = mesh and jax.tree.map(lambda x: x.sharding, state_inputs(config, settings, mesh))
    state = init_state(jax.random.key(0), config, settings, lies)
    prefix = jax.jit(lambda p: prefix_from(p, None, jnp.asarray(PROMPT), config=config))(params)
    batches = [put_batch(make_batch(seed=n, vocab=config.vocab_size), mesh) for n in range(2)]
    program, first = make_bake_step(config, settings).lower(state, params, batches[0], prefix).compile(), None
    for n in range(steps):
        state, metrics = program(state, params, batches[n % 2], prefix)
        first = first or {name: float(value) for name, value in metrics.items()}
    return first, jax.tree.map(np.asarray, state.delta.factors), program


baked = lru_cache(lambda text: ten_steps(meshes.make_mesh(text)))
alone = lru_cache(partial(ten_steps, None))


def check_same(found, expected):
    for name in ("loss", "grad_norm", "tokens"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5), name
    assert min(np.abs(factor["b"]).max() for factor in expected[1].values()) > 1e-3  # it began at 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found[1], expected[1])


@pytest.mark.parametrize("text", MESHES)
def test_ten_steps_are_those_of_one_device(text):
    check_same(baked(text), alone())


def results(text: str, kinds: str = r"[\w-]+") -> list[list[int]]:
    """Shapes of all results of these kinds of operations in a compiled program."""
    found = re.findall(rf"^\s*(?:ROOT )?\S+ = (.*?) (?:{kinds})\(", text, re.MULTILINE)
    return [[int(d) for d in s.split(",")] for line in found for s in re.findall(r"\w\[([\d,]+)\]", line)]


SENT = r"all-[\w-]+|collective-[\w-]+|reduce-scatter"


@pytest.mark.parametrize("text", MESHES)
def test_the_vocabulary_is_never_gathered(text):
    """A device has at most its stored block of an unembedding, and logits over its part of the vocabulary; what is
    sent holds no more of either."""
    mesh, program = meshes.make_mesh(text), baked(text)[-1].as_text()
    fsdp, tp, split = mesh.shape["fsdp"], mesh.shape["tp"], mesh.size // mesh.shape["replica"]
    shapes, part = results(program), CONFIG.vocab_size // split
    assert [CONFIG.vocab_size // tp, CONFIG.hidden_size // fsdp] in shapes  # as stored: the shapes are really seen
    assert any(part in shape for shape in shapes)
    assert tp == 1 or not any(CONFIG.vocab_size in shape for shape in shapes)
    assert fsdp == 1 or not any({CONFIG.hidden_size, CONFIG.vocab_size // tp} <= set(shape) for shape in shapes)
    for shape in results(program, SENT):
        assert fsdp == 1 or not set(shape) & {CONFIG.vocab_size, CONFIG.vocab_size // tp}, shape
        assert part not in shape or prod(shape) <= part * CONFIG.hidden_size, shape


@pytest.mark.parametrize("text", MESHES)
def test_the_base_is_there_once(text):
    """What comes in is each parameter's shard and little else, and no stack of whole layers is made: gathered weights
    live for one layer, forwards and backwards."""
    mesh, program = meshes.make_mesh(text), baked(text)[-1]
    inputs = step_inputs(CONFIG, bake_config(), Shape(8, 16, 16, 5), len(PROMPT), mesh, jnp.float32)
    arrays = [x for x in jax.tree.leaves(inputs[:4]) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    expected = sum(4 * prod(x.sharding.shard_shape(x.shape)) for x in arrays)
    taken = program.memory_analysis().argument_size_in_bytes
    assert abs(taken - expected) < 0.02 * expected + 16384, (taken, expected)  # a step leaves out what it does not use
    shapes, tp = results(program.as_text()), mesh.shape["tp"]
    weights = [x for x in jax.tree.leaves(inputs.params["layers"]) if x.ndim == 3]
    assert all(list(x.sharding.shard_shape(x.shape)) in shapes for x in weights)
    for n, a, b in (x.shape for x in weights):
        assert mesh.shape["fsdp"] == 1 or not any(made in shapes for made in ([n, a, b // tp], [n, a // tp, b]))


def test_decoding_moves_activations_and_no_weights():
    """Eight rows, a token each: nothing larger than their logits is sent."""
    mesh, rows = meshes.make_mesh("fsdp=4,tp=2"), 8
    params = params_inputs(CONFIG, mesh, jnp.float32)
    asked = engine.Rows(*(np.zeros(s, np.int32) for s in ((rows, 8), rows, rows, (rows, 2), rows, 4)))
    asked = asked.replace(keys=np.zeros((rows, 2), np.uint32), temperature=np.zeros(rows, np.float32))
    options = {"config": CONFIG, "greedy": True}
    state = jax.eval_shape(
        partial(engine.prefill, max_tokens=8, **options), params, None, asked, None, filters.Filters()
    )
    args = params, None, asked, None, filters.Filters(), state, jnp.int32(8)
    sent = results(engine.decode.lower(*args, **options).compile().as_text(), SENT)
    assert sent and max(map(prod, sent)) <= rows * CONFIG.vocab_size


def test_the_order_of_the_devices_does_not_matter():
    """A person's own mesh: other devices first, axes in another order, of jax's default axis type."""
    shuffled = np.array(jax.devices())[[5, 2, 7, 0, 3, 6, 1, 4]].reshape(2, 4)
    mesh = meshes.mesh(Mesh(shuffled, ("model", "fsdp")), CONFIG, names={"model": "tp"})
    assert meshes.parts("batch", mesh) == 4 and meshes.parts("heads", mesh) == 2
    check_same(ten_steps(mesh), baked("fsdp=4,tp=2"))


GEMMA = ModelConfig(
    family="gemma2", vocab_size=102, hidden_size=24, intermediate_size=42, num_layers=3, num_heads=6, num_kv_heads=3,
    head_dim=10, max_positions=128, tie_embeddings=True, init_range=0.2, norm_placement="sandwich", norm_offset=1.0,
    activation="gelu_tanh", attention_softcap=20.0, logit_softcap=10.0, windows=(5, 0, 5), qk_norm="head",
)  # fmt: skip


def test_odd_shapes_windows_soft_caps_and_rows_split_by_tokens():
    """51 tokens of the vocabulary on each half of tp do not divide by 4, nor 3 key heads by 2; two micro-batches."""
    settings = bake_config(optimizer=replace(ADAM, accumulate=2), loss=LossConfig(chunk_size=3))
    mesh = meshes.make_mesh("fsdp=2,context=2,tp=2")
    check_same(ten_steps(mesh, GEMMA, settings, 4), ten_steps(None, GEMMA, settings, 4))


def test_fused_projections_recomputation_and_rows_split_by_tokens():
    config = replace(CONFIG, family="phi3", fused_projections=True, windows=(7, 0, 7))
    settings = bake_config(train=TrainConfig(steps=20, remat=True))
    mesh = meshes.make_mesh("context=4,tp=2")
    check_same(ten_steps(mesh, config, settings, 3), ten_steps(None, config, settings, 3))


# The objective


@pytest.mark.parametrize(
    "divergence",
    [
        "forward",
        "forward pallas",
        "forward tiled",
        "reverse",
        "jsd",
        "jsd pallas",
        "jsd tiled",
        "cross_entropy",
        "cross_entropy pallas",
        "cross_entropy tiled",
    ],
)
def test_the_objective_over_parts_of_the_vocabulary(divergence):
    """27 tokens and 106 words, none of which divide; a teacher of another width, both soft-capped."""
    keys = jax.random.split(jax.random.key(1), 6)
    student, teacher = jax.random.normal(keys[0], (27, 16)), jax.random.normal(keys[1], (27, 24))
    heads = jax.random.normal(keys[2], (106, 16)), jax.random.normal(keys[3], (106, 24))
    weights = jax.random.uniform(keys[4], (27,)).at[3].set(0)
    targets = jax.random.randint(keys[5], (27,), 0, 106)
    divergence, _, kernel = divergence.partition(" ")

    def loss(student, heads, teacher, weights):
        return fused_kl(
            student, heads[0], teacher, heads[1], weights, targets_N=targets, divergence=divergence, softcap=8.0,
            temperature=1.3, chunk_size=2, implementation=kernel or "xla",
        )[0]  # fmt: skip

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 3)))
    value, grads = step(student, heads, teacher, weights)
    for text in ("fsdp=4,tp=2", "replica=2,fsdp=2,context=2"):
        mesh = meshes.make_mesh(text)
        placed = tuple(meshes.put(head, ("vocab", "embed"), mesh) for head in heads)
        value_, grads_ = step(student, placed, teacher, weights)
        assert float(value_) == pytest.approx(float(value), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads_, grads)


def test_moments_over_parts_of_the_vocabulary():
    keys = jax.random.split(jax.random.key(1), 4)
    student, teacher = (jax.random.normal(key, (27, 16)) for key in keys[:2])
    head, weights = jax.random.normal(keys[2], (106, 16)), jax.random.uniform(keys[3], (27,)).at[3].set(0)

    def loss(student, head, known, weights):
        return fused_kl(student, head, known, None, weights, temperature=1.3)[0]

    make, step = jax.jit(partial(moments_of, temperature=1.3)), jax.jit(jax.value_and_grad(loss, argnums=(0, 3)))
    known = make(teacher, head)
    value, grads = step(student, head, known, weights)
    for text in ("fsdp=4,tp=2", "replica=2,fsdp=2,context=2"):
        placed = meshes.put(head, ("vocab", "embed"), meshes.make_mesh(text))
        known_ = make(teacher, placed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), known_, known)
        value_, grads_ = step(student, placed, known_, weights)
        assert float(value_) == pytest.approx(float(value), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads_, grads)


def test_metrics_over_parts_of_the_vocabulary():
    keys = jax.random.split(jax.random.key(1), 3)
    student, teacher = jax.random.normal(keys[0], (2, 24, 16))
    head, weights = jax.random.normal(keys[1], (106, 16)), jnp.ones(24)
    measure = jax.jit(lambda head: fused_metrics(student, head, teacher, None, weights, chunk_size=2))
    alone, spread = measure(head), measure(meshes.put(head, ("vocab", "embed"), meshes.make_mesh("fsdp=4,tp=2")))
    assert 0 < float(alone["agreement"]) < 24
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), spread, alone)


# Sampling and the whole bake


def test_sampling_and_baking_on_a_mesh_are_those_of_one_device():
    from tiny_base import CONFIG as SMALL
    from tiny_base import STIMULI, tiny_bake, tiny_base, with_train

    alone, settings = tiny_base(), with_train(replace(SMALL, sampling=replace(SMALL.sampling, max_tokens=5)), steps=6)
    spread = on_mesh(alone, "fsdp=4,tp=2")
    options = {"system": "You are a sailor. Say ahoy.", "max_tokens": 6, "temperature": 1.0}
    assert jb.sample(spread, STIMULI[:5], **options) == jb.sample(alone, STIMULI[:5], **options)
    np.testing.assert_allclose(jb.logits(spread, [[3, 4, 5]]), jb.logits(alone, [[3, 4, 5]]), rtol=0, atol=1e-5)
    one = tiny_bake(config=settings, base=alone)
    many = tiny_bake(config=replace(settings, mesh="fsdp=4,tp=2"), base=alone)
    assert many.kl_before == pytest.approx(one.kl_before, rel=1e-5)
    assert many.kl_after == pytest.approx(one.kl_after, rel=1e-4)
    found, expected = ({k: np.asarray(v) for k, v in flat(x.delta.factors).items()} for x in (many, one))
    for name, factor in expected.items():
        np.testing.assert_allclose(found[name], factor, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kept", ["hidden states", "top k", "some steps'"])
def test_several_prompts_on_a_mesh_train_as_on_one_device(kept):
    import test_prompts as prompts
    from tiny_base import tiny_base

    changes = {"steps": 4, **({"top_k": 16} if kept == "top k" else prompts.NOWHERE if kept == "some steps'" else {})}
    spread = prompts.trained(base=on_mesh(tiny_base(), "fsdp=4,tp=2"), **changes)
    for found, expected in zip(spread, prompts.trained(**changes), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_many_bakes_on_a_mesh_are_those_of_one_device(tmp_path):
    """Three members, of other ranks and slots; one ends early, and the others close up."""
    from tiny_base import CONFIG as SMALL
    from tiny_base import CONTEXTS, PINS, STIMULI, tiny_base, with_train

    short = replace(SMALL, optimizer=ADAM, sampling=replace(SMALL.sampling, max_tokens=5))
    wide = replace(short, lora=LoraConfig(rank=2, alpha=2.0, targets="all"), seed=2)
    configs = {
        "one": with_train(short, steps=8, checkpoint_every=4),
        "two": with_train(wide, steps=4, checkpoint_every=4, teacher_device_gb=0.0, teacher_host_gb=0.0),
        "three": with_train(replace(wide, seed=3), steps=4, checkpoint_every=4),
    }

    def bake(mesh, output):
        specs = [
            jb.BakeSpec(name, f"Be {name}.", STIMULI, replace(config, mesh=mesh), pins=PINS, contexts=CONTEXTS)
            for name, config in configs.items()
        ]
        return jb.bake_many(tiny_base(), specs, output)

    for one, many in zip(bake(None, None), bake("fsdp=4,tp=2", tmp_path), strict=True):
        assert many.kl_after == pytest.approx(one.kl_after, rel=1e-4)
        found, expected = ({k: np.asarray(v) for k, v in flat(x.delta.factors).items()} for x in (many, one))
        for name, factor in expected.items():
            np.testing.assert_allclose(found[name], factor, rtol=0, atol=1e-5, err_msg=name)
    assert all(again.reused for again in bake("fsdp=4,tp=2", tmp_path))


@pytest.mark.parametrize("online", [False, True])
def test_a_step_measured_on_a_mesh_does_what_it_does_on_one_device(monkeypatch, online):
    from jaxbake.bench import step
    from jaxbake.bench.shape import model_config
    from jaxbake.bench.sizes import Shape

    monkeypatch.setattr(step, "peak_flops", lambda dtype: 1e12)
    shape = Shape(layers=2, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=128, prompt_len=16, question_len=8,
                  response_len=8, batch=8)  # fmt: skip
    config = model_config(shape)
    one, many = (
        step.bench_step(config, shape, steps=2, warmup=1, online=online, mesh=m) for m in (None, "fsdp=4,tp=2")
    )
    assert (one["mesh"], many["mesh"]) == ("1 device", "fsdp=4,tp=2")
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert many["share_of_peak"] * 8 * many["median_step_s"] == pytest.approx(
        one["share_of_peak"] * one["median_step_s"]
    )


def flat(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}
