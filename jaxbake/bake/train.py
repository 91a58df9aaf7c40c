"""The training loop of a bake: steps, held-out evaluation, early stop, metrics and checkpoints."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.abstract import put_batch, state_inputs
from jaxbake.bake.checkpoint import Checkpoints
from jaxbake.bake.folder import MetricsLog, Runs
from jaxbake.bake.known import Known, Teachers, teach
from jaxbake.bake.other import Other
from jaxbake.bake.progress import Progress
from jaxbake.bake.step import BakeState, init_state, make_bake_step, make_eval_step
from jaxbake.config import BakeConfig
from jaxbake.data.batches import Batches
from jaxbake.data.chat import Example
from jaxbake.deltas.lora import Delta
from jaxbake.errors import JaxbakeError, Preempted, TrainingDiverged
from jaxbake.files import AnyPath
from jaxbake.memory import trim_after_compiling
from jaxbake.mesh import parts
from jaxbake.models.base import Base


@dataclass(frozen=True)
class Trained:
    """A delta, the step it is of, and a row of metrics per step. useful_fraction: of the row tokens that were computed,
    the share that is no padding."""

    delta: Delta
    step: int
    metrics: list[dict[str, float]]
    useful_fraction: float


@dataclass
class Best:
    """The lowest held-out KL so far, its step, evaluations since, and (where they are wanted) the factors it had."""

    kl: float = math.inf
    step: int = 0
    since: int = 0
    factors: dict = field(default_factory=dict)

    def see(self, kl: float, step: int, factors: dict | None) -> None:
        if kl < self.kl:
            self.kl, self.step, self.since = kl, step, 0
            if factors is not None:
                self.factors = jax.tree.map(jnp.copy, factors)
        else:
            self.since += 1

    def cursor(self) -> dict[str, float]:
        return {"kl": self.kl, "step": self.step, "since": self.since}


class _HeldOut:
    """Evaluation on the held-out examples; what the teacher says about them is computed once."""

    def __init__(self, base: Base, config: BakeConfig, batches: Batches, known: Known):
        self._params = base.params
        self._evaluate = make_eval_step(base.config, config)
        self._batches = [(put_batch(batch, base.mesh), known(batch.source)) for batch in batches.all()]

    def __call__(self, delta: Delta) -> dict[str, float]:
        sums = [self._evaluate(delta, self._params, batch, **told) for batch, told in self._batches]
        kl, count, agreement = (sum(float(x) for x in column) for column in zip(*sums, strict=True))
        return {"held_out_kl": kl / count, "held_out_agreement": agreement / count}


def train(
    base: Base,
    config: BakeConfig,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    folder: AnyPath | None,
    progress: Progress,
    runs: Runs,
    other: Other | None = None,
) -> Trained:
    """Trains a delta on the examples, or goes on from the folder's newest checkpoint, bitwise as if never stopped.

    Their teacher is the base, or the other model. Without a folder nothing is written. Raises Preempted once everything
    is saved after a SIGTERM (see `hosts.start`), and TrainingDiverged where a loss is not finite; its attribute `delta`
    is the last good one, and the folder's newest checkpoint its state.
    """
    trim_after_compiling()
    settings, accumulate = config.train, config.optimizer.accumulate
    sizes = {"batch_size": settings.batch_size, "max_length": settings.max_length, "seed": config.seed}
    rows = parts("batch", base.mesh)  # every device has as many of them
    sizes["tokens_multiple"] = parts("seq", base.mesh)
    teachers = Teachers(base, [*examples, *held_out], settings.batch_size, other)
    batches = Batches(examples, teachers.prompts, rows_multiple=accumulate * rows, **sizes)
    told, known = teach(teachers, config, batches, folder)
    evaluate = _HeldOut(base, config, Batches(held_out, teachers.prompts, rows_multiple=rows, **sizes), known)
    step = make_bake_step(base.config, config)
    lie = base.mesh and jax.tree.map(lambda x: x.sharding, state_inputs(base.config, config, base.mesh))
    state, best = init_state(jax.random.key(config.seed), base.config, config, lie), Best()
    if settings.patience:
        best.factors = jax.tree.map(jnp.copy, state.delta.factors)

    with Checkpoints(folder / layout.CHECKPOINTS) if folder else nullcontext() as checkpoints:
        resumed = checkpoints.latest if checkpoints else None
        if resumed is not None:
            state, factors, cursor = checkpoints.restore(state, best.factors)
            best = Best(cursor["kl"], int(cursor["step"]), int(cursor["since"]), factors)
            runs.note(responses=runs.rows[-1]["responses"], step=resumed)
        log = MetricsLog(folder and folder / layout.METRICS, resumed)
        boarded = settings.tensorboard and folder and hosts.is_first()
        board = TensorBoard(folder / layout.TENSORBOARD) if boarded else None

        def record(row: dict[str, float]) -> None:
            log.add(row)
            if board:
                board.add(row)
            shown = {k.replace("held_out_", ""): row[k] for k in ("loss", "held_out_kl") if k in row}
            progress("bake", row["step"], settings.steps, shown)

        n = resumed or 0
        if resumed is None:
            row = {"step": 0, **evaluate(state.delta)}
            best.see(row["held_out_kl"], 0, state.delta.factors if settings.patience else None)
            record(row)
        waiting: deque[tuple[int, dict[str, jax.Array]]] = deque()

        def settle(keep: int, more: dict[str, float] | None = None) -> None:
            """Records all but the newest `keep` steps: reading a step's metrics waits for it, so a step behind."""
            while len(waiting) > keep:
                number, metrics = waiting.popleft()
                row = {"step": number, **{k: float(v) for k, v in metrics.items()}}
                if not is_finite(row):
                    log.flush()
                    diverged(number, row, state, best, checkpoints, config)
                record(row | (more or {}) if number == n else row)

        batch = batches.batch(n)
        while n < settings.steps and not (settings.patience and best.since >= settings.patience):
            placed = put_batch(batch, base.mesh)
            state, metrics = step(state, base.params, placed, **told(n, batch))
            n += 1
            waiting.append((n, metrics))
            batch = batches.batch(n)  # while the step runs
            last = n == settings.steps
            if last or n % settings.eval_every == 0:
                settle(keep=1)
                held = evaluate(state.delta)
                settle(keep=0, more=held)
                best.see(held["held_out_kl"], n, state.delta.factors if settings.patience else None)
            leave = not last and hosts.stop_asked()
            if checkpoints and (last or leave or n % settings.checkpoint_every == 0):
                settle(keep=0)
                log.flush()
                checkpoints.save(state, best.factors, best.cursor())
            settle(keep=1)
            if leave:
                raise Preempted(
                    f"step {n} is saved" if checkpoints else f"step {n} is lost, no output folder was given"
                )
    if settings.patience:
        return Trained(state.delta.replace(factors=best.factors), best.step, log.rows, batches.useful_fraction())
    return Trained(state.delta, n, log.rows, batches.useful_fraction())


def is_finite(row: dict[str, float]) -> bool:
    """Whether a step's loss and gradient are."""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def diverged(
    number: int, row: dict, state: BakeState, best: Best, checkpoints: Checkpoints | None, config: BakeConfig
) -> None:
    """Keeps the state before the step that failed (the step itself left it as it was), and says so."""
    good, where = int(state.step), "the error's delta"
    if checkpoints:
        checkpoints.save(state, best.factors, best.cursor())
        checkpoints.wait()
        where = str(checkpoints.folder / str(good))
    error = TrainingDiverged(
        f"step {number}: the loss is {row['loss']} and the gradient's norm {row['grad_norm']}; stopped. The last good "
        f"state, after step {good}, is kept in {where}. Lower optimizer.learning_rate "
        f"(now {config.optimizer.learning_rate:g}) and bake into another folder"
    )
    error.delta = state.delta
    raise error


class TensorBoard:
    """The same figures for TensorBoard."""

    def __init__(self, folder: AnyPath):
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise JaxbakeError("train.tensorboard: needs TensorBoard; pip install 'jaxbake[tensorboard]'") from error
        self._writer: Any = Writer(str(folder))

    def add(self, row: dict[str, float]) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()
