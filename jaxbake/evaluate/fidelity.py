"""How near the baked model's next-token distributions are to those it should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.bake.abstract import put_batch
from jaxbake.bake.asking import Asker
from jaxbake.bake.known import Known
from jaxbake.bake.teacher import hidden_at
from jaxbake.data.batches import Batch, Batches
from jaxbake.data.chat import Example
from jaxbake.mesh import parts
from jaxbake.models.decoder import unembedding
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import fused_metrics


@dataclass(frozen=True)
class Fidelity:
    """KL(teacher || student) in nats per token, and the share of tokens whose most likely token is the same.

    before: the base without its delta as student; after: with it. first: on each response's first token only, where
    the divergence is largest. tokens: how many were compared.
    """

    kl_before: float
    kl_after: float
    first_kl_before: float
    first_kl_after: float
    agreement_before: float
    agreement_after: float
    tokens: int

    @property
    def reduction(self) -> float | None:
        """Share of the KL that the bake took away; None where there was none."""
        return 1 - self.kl_after / self.kl_before if self.kl_before > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "reduction": self.reduction}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fidelity:
        """The inverse of `to_dict`."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def fidelity(
    base: Any, delta: Any, examples: Sequence[Example], *, batch_size: int = 16, max_length: int | None = None
) -> Fidelity:
    """Compares teacher view and student view over the matched tokens of examples, before the delta and with it.

    All tokens count alike. Raises JaxbakeError for no examples, or one longer than max_length (the model's context).
    """
    asker = Asker(base, examples, min(batch_size, len(examples)))
    known = Known(base, asker.hidden())
    batches = Batches(
        examples, asker.prompts, batch_size=min(batch_size, len(examples)),
        max_length=max_length or base.config.max_positions, seed=0, rows_multiple=parts("batch", base.mesh),
        tokens_multiple=parts("seq", base.mesh),
    )  # fmt: skip
    sizes = [int(example.mask.sum()) for example in examples]
    starts = np.cumsum(sizes) - sizes
    # Doubles: thousands of batches' sums are added up.
    total = {"all": np.zeros((2, 2)), "first": np.zeros((2, 2))}
    for batch in batches.all():
        real = batch.source >= 0
        weights = {"all": real, "first": real & np.isin(batch.source, starts)}
        weights = {name: w.astype(np.float32) for name, w in weights.items()}
        placed, teacher = put_batch(batch, base.mesh), known(batch.source)["known"]
        for name, sums in _compare(base.params, delta, teacher, placed, weights, config=base.config).items():
            total[name] += hosts.fetch(sums).astype(np.float64)
    (kl_before, agree_before), (kl_after, agree_after) = total["all"] / sum(sizes)
    first_before, first_after = total["first"][:, 0] / len(examples)
    return Fidelity(
        float(kl_before), float(kl_after), float(first_before), float(first_after), float(agree_before),
        float(agree_after), sum(sizes),
    )  # fmt: skip


@partial(jax.jit, static_argnames="config")
def _compare(
    params: Any, delta: Any, teacher: jax.Array, batch: Batch, weights: dict, *, config: ModelConfig
) -> dict[str, jax.Array]:
    """By name of the weights, [[KL, agreement] before, [KL, agreement] after], summed over tokens."""
    unembed = unembedding(params)

    def measure(student, weights):
        sums = fused_metrics(student, unembed, teacher, unembed, weights, softcap=config.logit_softcap)
        return jnp.stack([sums["kl"], sums["agreement"]])

    students = [hidden_at(params, d, batch.student, config=config) for d in (None, delta)]
    return {name: jnp.stack([measure(s, w) for s in students]) for name, w in weights.items()}
