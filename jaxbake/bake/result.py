"""What a bake comes to, as it is returned and as a folder holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.folder import Runs, claim, read_metrics
from jaxbake.bake.job import Job
from jaxbake.bake.quantisation import quantised_kl
from jaxbake.bake.train import Trained
from jaxbake.bakery.card import FILE as CARD
from jaxbake.bakery.card import Card, make_card
from jaxbake.bakery.store import load_delta, save_delta
from jaxbake.data.chat import Example
from jaxbake.deltas.lora import Delta
from jaxbake.files import AnyPath
from jaxbake.models.base import Base


@dataclass(frozen=True)
class BakeResult:
    """What a bake gives.

    metrics: a dictionary per step, as in `metrics.jsonl`: "step" (updates so far), "loss", "grad_norm", "update_norm",
      "learning_rate", "tokens", and where it was evaluated "held_out_kl" (nats per token, to the prompted model) and
      "held_out_agreement" (share of tokens with the same most likely token). Step 0 is the base.
    kl_before, kl_after: held-out KL of the base and of this delta.
    output: the folder, or None. reused: the folder already held this bake, finished.
    """

    delta: Delta
    card: Card
    metrics: list[dict[str, float]]
    kl_before: float
    kl_after: float
    output: AnyPath | None = None
    reused: bool = False


def make_result(
    base: Base, job: Job, trained: Trained, held_out: Sequence[Example], runs: Runs, name: str, recipe: Any
) -> BakeResult:
    """What a trained job came to, with its card; written where it has a folder."""
    cost = quantised_kl(base, held_out) if base.quantize else {}
    kl = [row["held_out_kl"] for row in trained.metrics if row["step"] in (0, trained.step)]
    delta, several = hosts.fetch(trained.delta), {"prompts": len(job.texts)} if len(job.texts) > 1 else {}
    card = make_card(
        base, delta, name=name, prompt=None if several else job.texts[0], prompt_sha256=job.digest,
        config=recipe or job.config, seeds={"bake": job.config.seed}, teacher=job.other,
        metrics={
            "held_out_kl_before": kl[0], "held_out_kl": kl[-1], "steps": trained.step,
            "useful_fraction": trained.useful_fraction, **several, **cost,
        },
        environment=runs.environment, resumes=runs.resumes,
    )  # fmt: skip
    if job.folder:
        save_delta(delta, card, job.folder / layout.DELTA)
    return BakeResult(trained.delta, card, trained.metrics, kl[0], kl[-1], job.folder)


def is_finished(job: Job) -> bool:
    """Whether the job's folder holds its delta. Raises JaxbakeError where it holds another bake."""
    if (job.folder / layout.IDENTITY).exists():
        claim(job.folder, job.identity)
    return (job.folder / layout.DELTA / CARD).exists()


def read_result(job: Job, base: Base) -> BakeResult:
    """What the job's folder already holds."""
    delta, card = load_delta(job.folder / layout.DELTA, base)
    kl = [card.metrics["held_out_kl_before"], card.metrics["held_out_kl"]]
    return BakeResult(delta, card, read_metrics(job.folder / layout.METRICS), *kl, job.folder, reused=True)
