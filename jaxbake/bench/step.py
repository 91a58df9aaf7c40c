"""The bake step at steady state."""

from __future__ import annotations

import time
from dataclasses import asdict

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbake import mesh as meshes
from jaxbake.bake.abstract import HIDDEN_AXES, put_batch, state_inputs
from jaxbake.bake.asking import in_form
from jaxbake.bake.step import init_state, make_bake_step
from jaxbake.bake.targets import kept_form
from jaxbake.bench.clock import Clock, machine, peak_flops, peak_memory_mb
from jaxbake.bench.flops import matmul_flops
from jaxbake.bench.shape import necessary_flops, random_params
from jaxbake.bench.sizes import Shape
from jaxbake.config import BakeConfig, LoraConfig, TrainConfig
from jaxbake.data.batches import Batches
from jaxbake.data.chat import Example
from jaxbake.memory import trim_after_compiling
from jaxbake.models.base import put_params
from jaxbake.models.cache import Prefix
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import SoftTargets
from jaxbake.sampling.generate import shared_prefix

EPOCH = 4  # batches of different examples


def bench_step(
    config: ModelConfig,
    shape: Shape,
    *,
    rank: int = 16,
    dtype: str = "float32",
    steps: int = 10,
    warmup: int = 3,
    seed: int = 0,
    online: bool = False,
    mixed: bool = False,
    remat: bool = False,
    mesh: str | None = None,
) -> dict:
    """Times bake steps on random weights and tokens; returns what `jaxbake bench step --json` prints.

    online: with the teacher's pass, as where an answer is visited once; otherwise it was asked before.
    mixed: questions and responses of many lengths (log-normal, at most the shape's), packed into rows.
    mesh: "fsdp=4,tp=2" or "auto", of all devices; the share of the peak is then of theirs together, and memory of one.
    """
    trim_after_compiling()
    on = None if mesh is None else meshes.mesh(mesh, config, shape.batch)
    prompt, examples = make_examples(config, shape, seed, mixed)
    longest = shape.question_len + shape.response_len
    batches = Batches(
        examples, prompt, batch_size=shape.batch, max_length=4 * longest if mixed else longest, seed=seed,
        rows_multiple=meshes.parts("batch", on), tokens_multiple=meshes.parts("seq", on),
    )  # fmt: skip
    settings = BakeConfig(
        lora=LoraConfig(rank=rank, alpha=2.0 * rank),
        train=TrainConfig(steps=steps + warmup, batch_size=shape.batch, remat=remat),
        seed=seed,
    )
    params, lies = random_params(config, dtype, seed), None
    if on is not None:
        params = put_params(params, config, on)
        lies = jax.tree.map(lambda x: x.sharding, state_inputs(config, settings, on))
    state = init_state(jax.random.key(seed), config, settings, lies)
    step = make_bake_step(config, settings)
    told = _told(config, settings, params, prompt, online, on)

    before = peak_flops(dtype)
    batch = put_batch(batches.batch(0), on)
    flops = matmul_flops(step, state, params, batch, **told(batch))
    start = time.perf_counter()
    compiled = step.lower(state, params, batch, **told(batch)).compile()
    compile_s = time.perf_counter() - start
    clock, useful, loss = Clock(), 0.0, float("nan")
    for n in range(warmup + steps):
        if n == warmup:
            clock = Clock()
        batch = batches.batch(n)
        state, metrics = clock.time(lambda batch=batch: step(state, params, put_batch(batch, on), **told(batch)))  # noqa: B023
        loss, useful = float(metrics["loss"]), useful + float(np.sum(batch.weights > 0)) * (n >= warmup)
    peak = max(before, peak_flops(dtype)) * (1 if on is None else on.size)
    figures = clock.figures("step")
    median = figures["median_step_s"]
    out = {
        "tool": "jaxbake bench step",
        "mode": "online" if online else "cached targets",
        "shape": asdict(shape),
        "rank": rank,
        "dtype": dtype,
        **machine(),
        "mesh": meshes.describe(on),
        "response_tokens_per_s": useful / steps / median,
        **figures,
        "compile_s": compile_s,
        "peak_mb": peak_memory_mb(),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "matmul_gflop": flops / 1e9,
        "measured_peak_gflops": peak / 1e9,
        "share_of_peak_done": flops / median / peak,
        "useful_fraction": batches.useful_fraction(),
        "projected_fraction": batches.projected_fraction(),
        "rows": [asdict(s) for s in batches.shapes],
        "loss": loss,
    }
    if not mixed:
        needed = necessary_flops(config, shape, rank, cached=not online)
        out |= {"necessary_gflop": needed / 1e9, "share_of_peak": needed / median / peak}
    return out


def make_examples(config: ModelConfig, shape: Shape, seed: int, mixed: bool) -> tuple[np.ndarray, list[Example]]:
    """A random prompt, int32 [P], and examples behind it."""
    random = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return random.integers(min(3, config.vocab_size - 1), config.vocab_size, count).astype(np.int32)

    def length(most: int) -> int:
        return int(np.clip(random.lognormal(np.log(most / 3), 0.6), 4, most)) if mixed else most

    prompt = tokens(shape.prompt_len)
    examples = []
    for _ in range(EPOCH * shape.batch * (4 if mixed else 1)):
        question, response = tokens(length(shape.question_len)), tokens(length(shape.response_len))
        teacher = np.concatenate([prompt, question])
        examples.append(Example("bake", teacher, question, response, np.ones(response.size, bool)))
    return prompt, examples


def _told(config: ModelConfig, settings: BakeConfig, params, prompt: np.ndarray, online: bool, mesh: Mesh | None):
    """Keyword arguments of the step: the prompt's keys and values, or what a bake keeps of a teacher (whose hidden
    states are random, of unit size)."""
    if online:
        prefix: Prefix | None = shared_prefix(params, None, prompt, config=config) if prompt.size else None
        return lambda batch: {"prefix": prefix}
    known = {}

    def told(batch):
        key = batch.targets.shape
        if key not in known:
            known[key] = random_targets(config, settings, params, key, mesh)
        return {"known": known[key]}

    return told


def random_targets(
    config: ModelConfig, settings: BakeConfig, params, shape: tuple[int, int], mesh: Mesh | None = None
) -> SoftTargets:
    """What a bake keeps of a teacher at [B, K] tokens, of random hidden states of unit size."""
    dtype = params["norm"].dtype
    random = np.random.default_rng(settings.seed).standard_normal((*shape, config.hidden_size), np.float32)
    hidden = meshes.put(random.astype(dtype), HIDDEN_AXES, mesh)
    return in_form(params, hidden, config, kept_form(settings, config, dtype))
