"""Token ids in, token ids out: many prompts at once behind one shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.errors import JaxbakeError
from jaxbake.mesh import AnyMesh, mesh_of, parts, put
from jaxbake.models.cache import Prefix
from jaxbake.models.decoder import prefix_from
from jaxbake.models.spec import ModelConfig
from jaxbake.sampling import engine
from jaxbake.sampling.filters import Filters, make_filters


@dataclass(frozen=True)
class Generation:
    """One response. tokens int32 [n], the stop token included when it was drawn (`finished`).

    logprobs float32 [n]: natural-log probabilities under the model as it is, without temperature and filters.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool


SHORTEST = 32
"""Prompts are padded to at least so many tokens, so that most short ones share compiled code."""


def bucket(size: int, smallest: int = 8) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: few shapes to compile, at most a third of each unused."""
    step = smallest
    while step < size:
        if step * 3 // 2 >= size:
            return step * 3 // 2
        step *= 2
    return step


def shared_prefix(params: Any, delta: Any, tokens_P: Sequence[int] | np.ndarray, *, config: ModelConfig) -> Prefix:
    """Keys and values of a prompt's tokens, computed once, to put before the rows of `generate`.

    Padded to a bucket length so that prompts of similar length share compiled code: pass
    `prefix_visible=len(tokens_P)`. The delta must be the one that is sampled with.
    """
    tokens = np.asarray(tokens_P, np.int32)
    if tokens.size == 0:
        raise JaxbakeError("shared prefix: empty; it needs at least one token")
    mesh = mesh_of(params)
    padded = np.zeros(_multiple(bucket(tokens.size), "prefix", mesh), np.int32)
    padded[: tokens.size] = tokens
    return _prefix(params, delta, put(padded, (None,), mesh), config=config)


_prefix = jax.jit(prefix_from, static_argnames="config")


def _multiple(size: int, name: str, mesh: AnyMesh | None) -> int:
    """The size, or the next that can be split as the mesh asks."""
    return -(-size // parts(name, mesh)) * parts(name, mesh)


def _per_row(value, rows: int, name: str) -> list:
    """One value for all rows, or one for each."""
    values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value] * rows
    if len(values) != rows:
        raise JaxbakeError(f"{name}: {len(values)} values for {rows} prompts; give one for all, or one for each")
    return values


def _fill(values: Sequence, size: int, dtype) -> np.ndarray:
    return np.asarray(list(values) + [0] * (size - len(values)), dtype)


def check_room(prompts: Sequence, visible: Sequence[int], max_tokens: int, config: ModelConfig) -> None:
    """Raises JaxbakeError for a prompt that with its visible prefix and max_tokens exceeds the model's context."""
    if max_tokens < 1:
        raise JaxbakeError(f"max_tokens: {max_tokens} must be at least 1")
    for i, (prompt, seen) in enumerate(zip(prompts, visible, strict=True)):
        if seen + len(prompt) + max_tokens > config.max_positions:
            raise JaxbakeError(
                f"prompt {i}: {seen + len(prompt)} tokens and max_tokens {max_tokens} exceed the model's context of "
                f"{config.max_positions}; shorten one of them"
            )


@dataclass(frozen=True)
class _Run:
    """One batch being sampled: the arguments that prefill and decode have in common."""

    params: Any
    delta: Any
    rows: engine.Rows
    prefix: Prefix | None
    filters: Filters
    config: ModelConfig
    max_tokens: int
    greedy: bool

    def start(self) -> engine.State:
        return engine.prefill(
            self.params, self.delta, self.rows, self.prefix, self.filters,
            config=self.config, max_tokens=bucket(self.max_tokens), greedy=self.greedy,
        )  # fmt: skip

    def advance(self, state: engine.State, limit: int) -> engine.State:
        return engine.decode(
            self.params, self.delta, self.rows, self.prefix, self.filters, state,
            jnp.int32(min(limit, self.max_tokens)), config=self.config, greedy=self.greedy,
        )  # fmt: skip


def prepare(
    params: Any,
    delta: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    config: ModelConfig,
    prefix: Prefix | None = None,
    prefix_visible: int | Sequence[int] = 0,
    max_tokens: int,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    min_length: int = 0,
) -> _Run:
    """Checks and pads what `generate` is given. For callers that take the tokens as they come (`text.stream`)."""
    n = len(prompts)
    visible = _per_row(prefix_visible, n, "prefix_visible")
    temperatures = _per_row(temperature, n, "temperature")
    seeds = _per_row(list(range(n)) if seeds is None else seeds, n, "seeds")
    if any(not t >= 0 for t in temperatures):
        raise JaxbakeError(f"temperature: {min(temperatures)} must be 0 (greedy) or above")
    length = 0 if prefix is None else prefix.length
    for i, (prompt, seen) in enumerate(zip(prompts, visible, strict=True)):
        if len(prompt) == 0:
            raise JaxbakeError(f"prompt {i}: empty; it needs at least one token after the shared prefix")
        if not 0 <= seen <= length:
            raise JaxbakeError(f"prefix_visible: {seen} for prompt {i}; the shared prefix has {length} tokens")
    check_room(prompts, visible, max_tokens, config)
    mesh = mesh_of(params)
    b, t = (
        _multiple(bucket(n, 1), "batch", mesh),
        bucket(max(min_length, *(len(prompt) for prompt in prompts)), SHORTEST),
    )
    tokens, keys = np.zeros((b, t), np.int32), np.zeros((b, 2), np.uint32)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        tokens[i, t - len(prompt) :] = prompt
        keys[i] = (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF  # as jax.random.key(seed), for seeds of 64 bits too
    rows = engine.Rows(
        tokens=tokens,
        lengths=_fill([len(prompt) for prompt in prompts], b, np.int32),
        visible=_fill(visible, b, np.int32),
        keys=keys,
        temperature=_fill(temperatures, b, np.float32),
        stop_ids=np.asarray(list(stop_ids) + [-1] * (bucket(len(stop_ids), 4) - len(stop_ids)), np.int32),
    )
    greedy = not any(temperatures)
    filters = Filters() if greedy else make_filters(top_k, top_p, min_p)
    rows = jax.tree.map(lambda x, axes: put(x, axes, mesh), rows, engine.ROW_AXES)
    return _Run(params, delta, rows, prefix, filters, config, max_tokens, greedy)


def generate(
    params: Any, delta: Any, prompts: Sequence[Sequence[int] | np.ndarray], *, config: ModelConfig, **options
) -> list[Generation]:
    """Samples a response to every prompt, all of them in one batch; more than fit a batch are the caller's to chunk.

    A row's response depends on its own prompt and seed alone, not on its neighbours or their number. Batch, prompt and
    response lengths are rounded up to a few sizes, so that repeated calls do not compile again.

    Args:
      params, delta: the base, and a `Delta` or None.
      prompts: token ids of each prompt, those *after* the part of the shared prefix it sees.
      config: the model's.
      prefix, prefix_visible: a `Prefix` made with the same delta (`shared_prefix`), and how many of its tokens each row
        sees (one number for all, or one a row).
      max_tokens: longest response.
      temperature: one for all or one a row; 0 takes the most likely token.
      top_k, top_p, min_p: limits on what may be drawn, in this order, after the temperature.
      stop_ids: tokens that end a response.
      seeds: one a row; by default the row's index.
      min_length: prompts are padded to at least this length, so that calls may share one compiled program.

    Raises JaxbakeError for an empty prompt, one that with max_tokens exceeds the model's context, and values out of
    range.
    """
    if len(prompts) == 0:
        return []
    run = prepare(params, delta, prompts, config=config, **options)
    state = run.advance(run.start(), run.max_tokens)
    out = hosts.fetch((state.tokens, state.logprobs, state.lengths, state.finished))
    return [
        Generation(tokens[:length].copy(), logprobs[:length].copy(), bool(finished))
        for tokens, logprobs, length, finished in zip(*(x[: len(prompts)] for x in out), strict=True)
    ]
