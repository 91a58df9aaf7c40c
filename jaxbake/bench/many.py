"""Many bakes in one step beside one bake of as many tokens."""

from __future__ import annotations

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp

from jaxbake.bake.many.batches import side_by_side
from jaxbake.bake.many.step import hyper, init_states, make_many_step
from jaxbake.bake.step import init_state, make_bake_step
from jaxbake.bench.clock import Clock, machine, peak_memory_mb
from jaxbake.bench.shape import random_params
from jaxbake.bench.sizes import Shape
from jaxbake.bench.step import make_examples, random_targets
from jaxbake.config import BakeConfig, LoraConfig, TrainConfig
from jaxbake.data.batches import Batches, alike
from jaxbake.models.spec import ModelConfig


def bench_many(
    config: ModelConfig,
    shape: Shape,
    *,
    members: int = 32,
    rank: int = 16,
    dtype: str = "float32",
    steps: int = 10,
    warmup: int = 2,
    seed: int = 0,
) -> dict:
    """Times the step of `members` deltas with `shape.batch` examples each, and the step of one delta with as many
    examples in all, in turn; both with known targets, random weights and tokens. Returns what `jaxbake bench many
    --json` prints; `ratio` is the first's median over the second's."""
    longest = shape.question_len + shape.response_len
    settings = BakeConfig(
        lora=LoraConfig(rank=rank, alpha=2.0 * rank),
        train=TrainConfig(steps=steps + warmup, batch_size=shape.batch),
        seed=seed,
    )
    params = random_params(config, dtype, seed)

    def batches(size: int, seed: int) -> Batches:
        prompt, examples = make_examples(config, replace(shape, batch=size), seed, False)
        return Batches(examples, prompt, batch_size=size, max_length=longest, seed=seed)

    own = alike([batches(shape.batch, seed + m) for m in range(members)])
    configs = [replace(settings, seed=seed + m) for m in range(members)]
    group, hypers, active = init_states(config, configs), hyper(configs), jnp.ones(members, bool)
    many = make_many_step(config, settings.loss)
    single = batches(shape.batch * members, seed)
    state, one = init_state(jax.random.key(seed), config, settings), make_bake_step(config, settings)

    clocks, known, losses = (Clock(), Clock()), {}, (float("nan"),) * 2
    for n in range(warmup + steps):
        joined, batch = side_by_side([b.batch(n) for b in own]), single.batch(n)
        shapes = joined.targets.shape, batch.targets.shape
        if shapes not in known:
            known[shapes] = [random_targets(config, settings, params, shape) for shape in shapes]
        said = known[shapes]
        if n == warmup:
            clocks = (Clock(), Clock())
        group, m = clocks[0].time(lambda: many(group, hypers, active, params, joined, said[0]))  # noqa: B023
        state, s = clocks[1].time(lambda: one(state, params, batch, known=said[1]))  # noqa: B023
        losses = float(jnp.mean(m["loss"])), float(s["loss"])
    ours, theirs = (clock.figures("step") for clock in clocks)
    tokens = shape.response_len * shape.batch * members
    return {
        "tool": "jaxbake bench many",
        "mode": f"{members} deltas",
        "shape": asdict(shape),
        "members": members,
        "rank": rank,
        "dtype": dtype,
        **machine(),
        "response_tokens_per_s": tokens / ours["median_step_s"],
        **ours,
        "one_delta": {"response_tokens_per_s": tokens / theirs["median_step_s"], **theirs},
        "ratio": ours["median_step_s"] / theirs["median_step_s"],
        "cpu_ratio": ours["median_step_cpu_s"] / theirs["median_step_cpu_s"],
        "peak_mb": peak_memory_mb(),
        "losses": losses,
    }
