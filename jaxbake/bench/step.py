"""The bake step at steady state."""

from __future__ import annotations

import time
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bake.step import init_state, make_bake_step
from jaxbake.bench.clock import Clock, machine, peak_flops, peak_memory_mb
from jaxbake.bench.flops import matmul_flops
from jaxbake.bench.shape import necessary_flops, random_params
from jaxbake.bench.sizes import Shape
from jaxbake.config import BakeConfig, LoraConfig, TrainConfig
from jaxbake.data.batches import Batches
from jaxbake.data.chat import Example
from jaxbake.memory import trim_after_compiling
from jaxbake.models.decoder import Prefix
from jaxbake.models.spec import ModelConfig
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
) -> dict:
    """Times bake steps on random weights and tokens; returns what `jaxbake bench step --json` prints.

    online: with the teacher's pass, as in the first epoch; otherwise its hidden states are known, as in all later ones.
    mixed: questions and responses of many lengths (log-normal, at most the shape's), packed into rows.
    """
    trim_after_compiling()
    prompt, examples = make_examples(config, shape, seed, mixed)
    longest = shape.question_len + shape.response_len
    batches = Batches(examples, prompt, batch_size=shape.batch, max_length=4 * longest if mixed else longest, seed=seed)
    settings = BakeConfig(
        lora=LoraConfig(rank=rank, alpha=2.0 * rank),
        train=TrainConfig(steps=steps + warmup, batch_size=shape.batch, remat=remat),
        seed=seed,
    )
    params = random_params(config, dtype, seed)
    state = init_state(jax.random.key(seed), config, settings)
    step = make_bake_step(config, settings)
    known = _known(config, params, prompt, batches, online, seed)

    before = peak_flops(dtype)
    batch = batches.batch(0)
    flops = matmul_flops(step, state, params, batch, **known(batch))
    start = time.perf_counter()
    compiled = step.lower(state, params, batch, **known(batch)).compile()
    compile_s = time.perf_counter() - start
    clock, useful, loss = Clock(), 0.0, float("nan")
    for n in range(warmup + steps):
        if n == warmup:
            clock = Clock()
        batch = batches.batch(n)
        state, metrics = clock.time(lambda batch=batch: step(state, params, batch, **known(batch)))  # noqa: B023
        loss, useful = float(metrics["loss"]), useful + float(np.sum(batch.weights > 0)) * (n >= warmup)
    peak = max(before, peak_flops(dtype))
    figures = clock.figures("step")
    median = figures["median_step_s"]
    out = {
        "tool": "jaxbake bench step",
        "mode": "online" if online else "cached targets",
        "shape": asdict(shape),
        "rank": rank,
        "dtype": dtype,
        **machine(),
        "response_tokens_per_s": useful / steps / median,
        **figures,
        "compile_s": compile_s,
        "peak_mb": peak_memory_mb(),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "matmul_gflop": flops / 1e9,
        "measured_peak_gflops": peak / 1e9,
        "share_of_peak_done": flops / median / peak,
        "useful_fraction": batches.useful_fraction(),
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


def _known(config: ModelConfig, params, prompt: np.ndarray, batches: Batches, online: bool, seed: int):
    """Keyword arguments of the step: the prompt's keys and values, or (random, of unit size) hidden states."""
    if online:
        prefix: Prefix | None = shared_prefix(params, None, prompt, config=config) if prompt.size else None
        return lambda batch: {"prefix": prefix}
    hidden = {}

    def known(batch):
        key = batch.targets.shape
        if key not in hidden:
            random = np.random.default_rng(seed).standard_normal((*key, config.hidden_size), np.float32)
            hidden[key] = jnp.asarray(random, params["norm"].dtype)
        return {"teacher_hidden": hidden[key]}

    return known
