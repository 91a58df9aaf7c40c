"""The step's surroundings: the divergence alone, sampling, and the reading of weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake.bench.clock import Clock, machine, peak_flops, peak_memory_mb
from jaxbake.bench.flops import matmul_flops
from jaxbake.bench.shape import random_params
from jaxbake.bench.sizes import Shape
from jaxbake.models.checkpoint import read_params, write_params
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import fused_kl, reference_kl
from jaxbake.sampling.generate import bucket, generate, shared_prefix


def bench_kl(
    config: ModelConfig, shape: Shape, *, dtype: str = "float32", steps: int = 10, warmup: int = 2, seed: int = 0,
    divergence: str = "forward", plain: bool = False, chunk_size: int | None = None,
) -> dict:  # fmt: skip
    """Times value and gradient of the divergence over `batch * response_len` tokens; plain: the unfused reference."""
    random, n = np.random.default_rng(seed), shape.batch * shape.response_len
    student, teacher = (jnp.asarray(random.standard_normal((n, config.hidden_size), np.float32), dtype) for _ in "st")
    unembed = random_params(config, dtype, seed).get("lm_head")
    if unembed is None:
        unembed = random_params(config, dtype, seed)["embed_tokens"]
    weights = jnp.ones(n)
    objective = reference_kl if plain else fused_kl
    targets = jnp.zeros(n, jnp.int32) if divergence == "cross_entropy" else None

    def loss(student, unembed, teacher):
        return objective(
            student, unembed, teacher, None, weights, divergence=divergence, targets_N=targets, chunk_size=chunk_size
        )[0]

    f = jax.jit(jax.value_and_grad(loss))
    flops, args = matmul_flops(f, student, unembed, teacher), (student, unembed, teacher)
    out, clock, peak = _run(lambda: f(*args), steps, warmup, dtype)
    temporary = f.lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20
    median = out["median_call_s"]
    return {
        "tool": "jaxbake bench kl", "divergence": divergence, "version": "plain" if plain else "fused", "tokens": n,
        "vocab": config.vocab_size, "hidden": config.hidden_size, "dtype": dtype, **machine(),
        "tokens_per_s": n / median, **out, "peak_mb": peak_memory_mb(), "temporary_mb": temporary,
        "matmul_gflop": flops / 1e9, "measured_peak_gflops": peak / 1e9, "share_of_peak_done": flops / median / peak,
    }  # fmt: skip


def bench_sample(
    config: ModelConfig, shape: Shape, *, dtype: str = "float32", steps: int = 5, warmup: int = 1, seed: int = 0
) -> dict:
    """Times sampling `response_len` tokens for `batch` rows behind one shared prompt, the prompt's pass included."""
    random, params = np.random.default_rng(seed), random_params(config, dtype, seed)
    low = min(3, config.vocab_size - 1)
    prompt = random.integers(low, config.vocab_size, shape.prompt_len).astype(np.int32)

    def call() -> list:
        questions = random.integers(low, config.vocab_size, (shape.batch, shape.question_len)).astype(np.int32)
        shared = {}
        if prompt.size:
            shared = {"prefix": shared_prefix(params, None, prompt, config=config), "prefix_visible": prompt.size}
        return generate(params, None, list(questions), config=config, max_tokens=shape.response_len, **shared)

    start = time.perf_counter()
    rows = call()
    first = time.perf_counter() - start
    tokens = sum(row.tokens.size for row in rows)
    out, _, peak = _run(lambda: jax.block_until_ready(call()) and 0, steps, warmup, dtype)
    return {
        "tool": "jaxbake bench sample", "shape": asdict(shape), "dtype": dtype, **machine(),
        "tokens_per_s": tokens / out["median_call_s"], **out, "first_call_s": first, "peak_mb": peak_memory_mb(),
        "cache_slots": bucket(shape.response_len), "measured_peak_gflops": peak / 1e9,
    }  # fmt: skip


def bench_load(config: ModelConfig, *, dtype: str = "float32", steps: int = 3, warmup: int = 1, seed: int = 0) -> dict:
    """Times reading a model of this shape from safetensors, beside reading the same bytes plainly.

    The file has just been written, so both come from the system's cache where it fits: what is measured is our part.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_params(random_params(config, dtype, seed), config, Path(folder), {"model_type": config.family})
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        raw = Clock()
        for _ in range(steps):
            raw.time(lambda: [_read(file) for file in files] and 0)
        out, _, _ = _run(lambda: read_params(Path(folder), config, dtype), steps, warmup, None)
    return {
        "tool": "jaxbake bench load", "dtype": dtype, **machine(), "bytes": size,
        "gb_per_s": size / out["median_call_s"] / 1e9, "plain_reading_gb_per_s": size / min(raw.wall) / 1e9, **out,
        "peak_mb": peak_memory_mb(),
    }  # fmt: skip


def _read(file: Path) -> int:
    total, buffer = 0, bytearray(1 << 24)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            total += count
    return total


def _run(f: Callable, steps: int, warmup: int, dtype: str | None) -> tuple[dict, Clock, float]:
    """Figures, the clock, and the machine's peak (0 without a dtype)."""
    for _ in range(warmup):
        jax.block_until_ready(f())
    clock = Clock()
    for _ in range(steps):
        clock.time(f)
    return clock.figures("call"), clock, peak_flops(dtype) if dtype else 0.0
