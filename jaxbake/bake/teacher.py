"""Where target distributions come from: today the prompted model itself, behind its cached prompt."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxbake.chip import chip
from jaxbake.data.batches import Batch, View
from jaxbake.mesh import constrain, mesh_of
from jaxbake.models.cache import Prefix
from jaxbake.models.decoder import forward
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import SoftTargets

WORTH_FLOPS = 2**28
"""Of a forward pass, about a millisecond on two cores: for less, compiling a layer by itself is not worth it."""


class Targets(NamedTuple):
    """A teacher's next-token distributions, not yet projected to the vocabulary.

    known: [B, K, E] final hidden states, or what was made of them (`objectives.SoftTargets`); None for cross-entropy,
    which has no teacher. unembed: [V, E] over the student's vocabulary, None if it is the student's own matrix.
    softcap: of the teacher's logits, or None.
    """

    known: SoftTargets | None
    unembed: jax.Array | None
    softcap: float | None


class Teacher(Protocol):
    """Gives the targets of a batch. `params` are whatever the teacher needs, traced; nothing in it is trained."""

    def __call__(self, params: Any, batch: Batch, prefix: Prefix | None) -> Targets: ...


def hidden_at(
    params: Any,
    delta: Any,
    view: View,
    *,
    config: ModelConfig,
    prefix: Prefix | None = None,
    remat: bool = False,
) -> jax.Array:
    """Hidden states [B, K, D] at the positions that predict the matched tokens of a view."""
    visible = {} if prefix is None else {"prefix": prefix, "prefix_visible": view.prefix}
    hidden = partial(
        forward, params, delta, view.tokens, config=config, positions=view.positions, segment_ids=view.segments,
        remat=remat, **visible,
    )  # fmt: skip
    mesh = mesh_of(params)
    if mesh is None and _saves(view, config):
        return hidden(at=view.index)
    hidden_BTD = constrain(hidden(), ("batch", None, None), mesh)
    return jnp.take_along_axis(hidden_BTD, view.index[..., None], axis=1)


def _saves(view: View, config: ModelConfig) -> bool:
    """Whether what the last layer need not do (see `forward`'s `at`) is worth compiling that layer by itself: on a CPU,
    whose models have few layers."""
    unasked = view.tokens.size - view.index.size
    weights = 2 * config.num_heads * config.head_dim + 3 * config.intermediate_size
    return chip().platform == "cpu" and 2 * unasked * config.hidden_size * weights >= WORTH_FLOPS


def prompted_self(config: ModelConfig) -> Teacher:
    """The base without its delta, reading the prompt: the teacher of prompt baking (arXiv 2409.13697, eq. 2)."""

    def targets(params: Any, batch: Batch, prefix: Prefix | None) -> Targets:
        hidden = hidden_at(params, None, batch.teacher, config=config, prefix=prefix)
        return Targets(hidden, None, config.logit_softcap)

    return targets
