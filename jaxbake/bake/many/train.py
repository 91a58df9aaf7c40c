"""The training loop of many bakes in one step: each with its own batches, evaluations, early stop and metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.checkpoint import Checkpoints
from jaxbake.bake.folder import MetricsLog, Runs
from jaxbake.bake.many.batches import Evaluation, Rows
from jaxbake.bake.many.step import hyper, init_states, keep, make_many_eval, make_many_step, member_state
from jaxbake.bake.progress import Progress
from jaxbake.bake.step import BakeState
from jaxbake.bake.train import Best, TensorBoard, Trained, diverged
from jaxbake.config import BakeConfig
from jaxbake.data.chat import Example
from jaxbake.deltas.lora import Delta, target_slots
from jaxbake.deltas.many import cut
from jaxbake.errors import JaxbakeError, Preempted, TrainingDiverged
from jaxbake.files import AnyPath
from jaxbake.models.base import Base


@dataclass(frozen=True)
class Member:
    """One bake among many: its settings, its examples, and its folder (None writes nothing)."""

    name: str
    config: BakeConfig
    examples: Sequence[Example]
    held_out: Sequence[Example]
    folder: AnyPath | None
    runs: Runs


@flax.struct.dataclass
class _Group:
    """What a checkpoint holds: the step all members are at, and their states."""

    step: jax.Array
    states: BakeState


class _Seat:
    """One member in the loop: what it has seen so far, and what it came to."""

    def __init__(self, base: Base, member: Member, resumed: int | None, seen: dict[str, Any] | None):
        self.member, self.settings = member, member.config.train
        lora = member.config.lora
        self.like = Delta(dict.fromkeys(target_slots(base.config, lora)), jnp.float32(lora.scale), lora)
        self.best = Best() if seen is None else Best(seen["kl"], int(seen["step"]), int(seen["since"]))
        self.ended: int | None = None if seen is None or seen["ended"] < 0 else int(seen["ended"])
        self.error: TrainingDiverged | None = None
        self.said = None if seen is None else seen["error"]
        if resumed is not None:
            member.runs.note(responses=member.runs.rows[-1]["responses"], step=resumed)
        self.log = MetricsLog(member.folder and member.folder / layout.METRICS, resumed)
        board = member.folder and self.settings.tensorboard
        self._board = TensorBoard(member.folder / layout.TENSORBOARD) if board else None

    @property
    def idle(self) -> bool:
        """Whether it has come to its end, or diverged."""
        return self.ended is not None or self.error is not None or bool(self.said)

    def cursor(self) -> dict[str, Any]:
        ended = -1 if self.ended is None else self.ended
        return {**self.best.cursor(), "ended": ended, "error": str(self.error or self.said or "")}

    def due(self, n: int) -> bool:
        """Whether this member is evaluated after step n."""
        return self.ended is None and (n == self.settings.steps or n % self.settings.eval_every == 0)

    def record(self, row: dict[str, float]) -> None:
        self.log.add(row)
        if self._board:
            self._board.add(row)

    def see(self, held: dict[str, float], n: int) -> bool:
        """Takes in an evaluation; ends at the last step, or where patience is at its end. True for the best so far."""
        self.best.see(held["held_out_kl"], n, None)
        patience = self.settings.patience
        if n == self.settings.steps or (patience and self.best.since >= patience):
            self.ended = n
        return self.best.step == n


def check_alike(members: Sequence[Member]) -> None:
    """Raises JaxbakeError where members cannot share a step: all must have one loss."""
    first = members[0]
    for member in members[1:]:
        if member.config.loss != first.config.loss:
            raise JaxbakeError(
                f"{member.name}: bakes of one step need the same loss settings as '{first.name}' "
                f"({first.config.loss}); bake it by itself"
            )


def train_many(
    base: Base,
    members: Sequence[Member],
    folder: AnyPath | None,
    progress: Progress,
    ended: Callable[[int, Trained | TrainingDiverged], None],
    told: Collection[int] = (),
) -> None:
    """Trains all members together over one base; each comes out as `train` makes it alone, up to rounding.

    Goes on from the newest checkpoint in `folder`, bitwise as if never stopped. `ended(i, what)` is called for each
    member as it ends, after the state was saved; in a resumed run at once for those that had ended before, but for
    those in `told`. Members that have ended make room: once half of the places are idle, the others
    close up (which compiles the step anew). Raises Preempted as `train` does.
    """
    check_alike(members)
    configs = [member.config for member in members]
    most = max(config.train.steps for config in configs)
    every = min(config.train.checkpoint_every for config in configs)
    accumulate = max(config.optimizer.accumulate for config in configs)
    loss = configs[0].loss
    rows = Rows(base, members, accumulate)
    evaluation = Evaluation(base, members)
    step = make_many_step(base.config, loss, accumulate=accumulate, remat=any(c.train.remat for c in configs))
    evaluate = make_many_eval(base.config, loss)
    settings = hyper(configs)

    with Checkpoints(folder) if folder else nullcontext() as checkpoints:
        resumed = checkpoints.latest if checkpoints else None
        cursor = checkpoints.cursor() if resumed is not None else None
        places = list(range(len(members))) if cursor is None else [int(i) for i in cursor["places"]]
        seats = [_Seat(base, m, resumed, cursor and cursor["seats"][str(i)]) for i, m in enumerate(members)]
        group = _Group(jnp.int32(0), keep(init_states(base.config, configs), places))
        patient = any(seat.settings.patience for seat in seats)
        best = jax.tree.map(jnp.copy, group.states.delta.factors) if patient else {}
        if resumed is not None:
            group, best, _ = checkpoints.restore(group, best)
        state, n = group.states, resumed or 0
        hypers = keep(settings, places)

        def active() -> list[bool]:
            return [not seats[i].idle for i in places]

        def measure(due: list[int]) -> dict[int, dict[str, float]]:
            """The held-out figures of these members."""
            nonlocal best
            held = evaluation(evaluate, state.delta, base.params, places)
            held = {i: held[i] for i in due}
            better = [i in held and seats[i].see(held[i], n) for i in places]
            if patient:
                best = _replaced(best, state.delta.factors, jnp.asarray(better))
            return held

        waiting: deque[tuple[int, dict[str, jax.Array], list[bool]]] = deque()

        def settle(to: int, held: dict[int, dict[str, float]]) -> None:
            """Records all but the newest `to` steps; `held` are figures of the newest one."""
            while len(waiting) > to:
                number, metrics, was = waiting.popleft()
                table = {name: np.asarray(values) for name, values in metrics.items()}
                for place, i in enumerate(places):
                    seat = seats[i]
                    if not was[place] or seat.error:
                        continue
                    row = {"step": number, **{name: float(values[place]) for name, values in table.items()}}
                    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
                        seat.record(row | (held.get(i, {}) if number == n else {}))
                    else:
                        seat.error = _failed(seat, number, row, member_state(state, place, seat.like))
                losses = table["loss"][np.asarray(was)]
                shown = {"loss": float(np.mean(losses)), "bakes": int(sum(was))} if losses.size else {}
                progress("bake", number, most, shown)

        announced = {i for i, seat in enumerate(seats) if i in told and seat.idle}

        def new() -> list[int]:
            return [i for i, seat in enumerate(seats) if seat.idle and i not in announced]

        def tell() -> None:
            for i in new():
                announced.add(i)
                seat = seats[i]
                if seat.error is not None or seat.said:
                    ended(i, seat.error or TrainingDiverged(seat.said))
                elif i in places:
                    one = member_state(state, places.index(i), seat.like).delta
                    if seat.settings.patience:
                        factors = cut(best, places.index(i), one.config.rank, tuple(one.factors))
                        one = one.replace(factors=factors)
                    last = seat.best.step if seat.settings.patience else seat.ended
                    ended(i, Trained(one, last, seat.log.rows, rows.useful_fraction(i)))
                else:
                    raise JaxbakeError(
                        f"{members[i].name}: this bake had ended and its delta is gone; delete {folder} to bake anew"
                    )

        def save() -> None:
            for seat in seats:
                seat.log.flush()
            seen = {str(i): seat.cursor() for i, seat in enumerate(seats)}
            checkpoints.save(_Group(jnp.int32(n), state), best, {"places": places, "seats": seen})

        def keep_and_tell() -> None:
            settle(0, {})
            if checkpoints:
                save()
                if new():
                    checkpoints.wait()
            tell()

        if resumed is None:
            for i, held in measure(places).items():
                seats[i].record({"step": 0, **held})
        else:
            tell()
        batch = rows.batch(n, places)
        while any(active()):
            if n % every == 0 and 2 * sum(active()) <= len(places):  # only here, so that a resumed run does the same
                kept = [place for place, is_active in enumerate(active()) if is_active]
                places, state, hypers = [places[p] for p in kept], keep(state, kept), keep(hypers, kept)
                best = keep(best, kept)
                batch = rows.batch(n, places)
            was = active()
            hidden = rows.teacher(n, places, batch)
            state, metrics = step(state, hypers, jnp.asarray(was), base.params, batch, hidden)
            n += 1
            waiting.append((n, metrics, was))
            before = [i for i, is_active in zip(places, was, strict=True) if is_active]
            batch = rows.batch(n, places)  # while the step runs
            due = [i for i in before if seats[i].due(n)]
            if due:
                settle(1, {})
                held = measure(due)
                settle(0, held)
            leave = any(active()) and hosts.stop_asked()
            if new() or leave or n % every == 0:
                keep_and_tell()
            settle(1, {})
            if leave:
                raise Preempted(
                    f"step {n} is saved" if checkpoints else f"step {n} is lost, no output folder was given"
                )
        if new():  # those whose last step was seen to fail only now
            keep_and_tell()


@jax.jit
def _replaced(best: dict, factors: dict, better: jax.Array) -> dict:
    return jax.tree.map(lambda new, old: jnp.where(better[:, None, None], new, old), factors, best)


def _failed(seat: _Seat, number: int, row: dict, state: BakeState) -> TrainingDiverged:
    """The error of a member whose loss is not finite; its last good state is kept in its own folder."""
    member = seat.member
    try:
        with Checkpoints(member.folder / layout.CHECKPOINTS) if member.folder else nullcontext() as checkpoints:
            diverged(number, row, state, seat.best, checkpoints, member.config)
    except TrainingDiverged as error:
        return error
    raise AssertionError("unreachable")
