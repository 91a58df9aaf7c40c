"""The training loop of many bakes in one step: each with its own batches, evaluations, early stop and metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxbake import hosts
from jaxbake.bake.abstract import put_batch
from jaxbake.bake.checkpoint import Checkpoints
from jaxbake.bake.many.batches import Evaluation, Rows
from jaxbake.bake.many.seat import Member, Seat, check_alike
from jaxbake.bake.many.step import hyper, init_states, keep, make_many_eval, make_many_step, member_state, spread
from jaxbake.bake.progress import Progress
from jaxbake.bake.step import BakeState
from jaxbake.bake.train import Trained, is_finite
from jaxbake.deltas.lora import Delta
from jaxbake.deltas.many import cut
from jaxbake.errors import JaxbakeError, Preempted, TrainingDiverged
from jaxbake.files import AnyPath
from jaxbake.memory import trim_after_compiling
from jaxbake.mesh import put
from jaxbake.models.base import Base

Ended = Callable[[int, Trained | TrainingDiverged], None]


def train_many(
    base: Base,
    members: Sequence[Member],
    folder: AnyPath | None,
    progress: Progress,
    ended: Ended,
    told: Collection[int] = (),
) -> None:
    """Trains all members together over one base; each comes out as `train` makes it alone, up to rounding.

    Goes on from the newest checkpoint in `folder`, bitwise as if never stopped. `ended(i, what)` is called for each
    member as it ends, after the state was saved; in a resumed run at once for those that had ended before, but for
    those in `told`. Members that have ended make room: once half of the places are idle, the others
    close up (which compiles the step anew). Raises Preempted as `train` does.
    """
    trim_after_compiling()
    check_alike(members)
    with Checkpoints(folder) if folder else nullcontext() as checkpoints:
        _Loop(base, members, checkpoints, progress, ended, told).run()


@flax.struct.dataclass
class _Group:
    """What a checkpoint holds: the step all members are at, and their states."""

    step: jax.Array
    states: BakeState


class _Loop:
    """The members of one step, in their places: `places[p]` is the member whose rows and states are the p-th."""

    def __init__(
        self,
        base: Base,
        members: Sequence[Member],
        checkpoints: Checkpoints | None,
        progress: Progress,
        ended: Ended,
        told: Collection[int],
    ):
        self.base, self.checkpoints, self.progress, self.ended = base, checkpoints, progress, ended
        configs = [member.config for member in members]
        self.most = max(config.train.steps for config in configs)
        self.save_every = min(config.train.checkpoint_every for config in configs)
        self.patient = any(config.train.patience for config in configs)
        accumulate = max(config.optimizer.accumulate for config in configs)
        remat, loss = any(config.train.remat for config in configs), configs[0].loss
        self.rows = Rows(base, members, accumulate)
        self.evaluation = Evaluation(base, members, self.rows)
        self.step = make_many_step(base.config, loss, accumulate=accumulate, remat=remat)
        self.evaluate = make_many_eval(base.config, loss)
        self.waiting: deque[tuple[int, dict[str, jax.Array], list[bool]]] = deque()
        self._begin(members)
        self.announced = {i for i, seat in enumerate(self.seats) if i in told and seat.idle}

    def _begin(self, members: Sequence[Member]) -> None:
        """At step 0, or as the newest checkpoint says."""
        configs = [member.config for member in members]
        self.resumed = self.checkpoints.latest if self.checkpoints else None
        cursor = None if self.resumed is None else self.checkpoints.cursor()
        self.places = list(range(len(members))) if cursor is None else [int(i) for i in cursor["places"]]
        seen = [cursor and cursor["seats"][str(i)] for i in range(len(members))]
        self.seats = [Seat(self.base.config, m, self.resumed, s) for m, s in zip(members, seen, strict=True)]
        states = keep(init_states(self.base.config, configs), self.places)
        group = _Group(self._step(0), spread(states, self.base.config, self.base.mesh))
        self.best = jax.tree.map(jnp.copy, group.states.delta.factors) if self.patient else {}
        if self.resumed is not None:
            group, self.best, _ = self.checkpoints.restore(group, self.best)
        self.state, self.n = group.states, self.resumed or 0
        self.hypers = keep(hyper(configs), self.places)

    def _step(self, n: int) -> jax.Array:
        return put(np.int32(n), (), self.base.mesh)

    def run(self) -> None:
        if self.resumed is None:
            for i, held in self._measure(self.places).items():
                self.seats[i].record({"step": 0, **held})
        else:
            self._tell()
        self.batch = self.rows.batch(self.n, self.places)
        while any(self._active()):
            if self.n % self.save_every == 0:  # only here, so that a resumed run does the same
                self._close_up()
            due = [i for i in self._advance() if self.seats[i].due(self.n)]
            if due:
                self._settle(1)
                held = self._measure(due)
                self._settle(0, held)
            leave = any(self._active()) and hosts.stop_asked()
            if self._new() or leave or self.n % self.save_every == 0:
                self._save_and_tell()
            self._settle(1)
            if leave:
                kept = "is saved" if self.checkpoints else "is lost, no output folder was given"
                raise Preempted(f"step {self.n} {kept}")
        if self._new():  # those whose last step was seen to fail only now
            self._save_and_tell()

    def _active(self) -> list[bool]:
        return [not self.seats[i].idle for i in self.places]

    def _advance(self) -> list[int]:
        """A step; returns the members that took part."""
        was = self._active()
        known = self.rows.teacher(self.n, self.places, self.batch)
        batch = put_batch(self.batch, self.base.mesh)
        self.state, metrics = self.step(self.state, self.hypers, np.array(was), self.base.params, batch, known)
        self.n += 1
        self.waiting.append((self.n, metrics, was))
        self.batch = self.rows.batch(self.n, self.places)  # while the step runs
        return [i for i, is_active in zip(self.places, was, strict=True) if is_active]

    def _close_up(self) -> None:
        """Members that have ended leave their places, once these are half of all."""
        active = self._active()
        if 2 * sum(active) > len(active):
            return
        kept = [p for p, is_active in enumerate(active) if is_active]
        self.places = [self.places[p] for p in kept]
        self.state = spread(keep(self.state, kept), self.base.config, self.base.mesh)
        self.hypers, self.best = keep(self.hypers, kept), keep(self.best, kept)
        self.batch = self.rows.batch(self.n, self.places)

    def _measure(self, due: Sequence[int]) -> dict[int, dict[str, float]]:
        """The held-out figures of these members."""
        held = self.evaluation(self.evaluate, self.state.delta, self.base.params, self.places)
        held = {i: held[i] for i in due}
        better = [i in held and self.seats[i].see(held[i], self.n) for i in self.places]
        if self.patient:
            self.best = _replaced(self.best, self.state.delta.factors, np.asarray(better))
        return held

    def _settle(self, to: int, held: dict[int, dict[str, float]] | None = None) -> None:
        """Records all but the newest `to` steps: reading a step's metrics waits for it. `held`: of the newest one."""
        while len(self.waiting) > to:
            number, metrics, was = self.waiting.popleft()
            table = hosts.fetch(metrics)
            for at, i in enumerate(self.places):
                seat = self.seats[i]
                if not was[at] or seat.error:
                    continue
                row = {"step": number, **{name: float(values[at]) for name, values in table.items()}}
                if is_finite(row):
                    seat.record(row | ((held or {}).get(i, {}) if number == self.n else {}))
                else:
                    seat.failed(number, row, member_state(self.state, at, seat.like))
            losses = table["loss"][np.asarray(was)]
            shown = {"loss": float(np.mean(losses)), "bakes": int(sum(was))} if losses.size else {}
            self.progress("bake", number, self.most, shown)

    def _new(self) -> list[int]:
        """Members that have come to their end, of which nobody was told."""
        return [i for i, seat in enumerate(self.seats) if seat.idle and i not in self.announced]

    def _save_and_tell(self) -> None:
        self._settle(0)
        if self.checkpoints:
            for seat in self.seats:
                seat.log.flush()
            cursor = {"places": self.places, "seats": {str(i): seat.cursor() for i, seat in enumerate(self.seats)}}
            self.checkpoints.save(_Group(self._step(self.n), self.state), self.best, cursor)
            if self._new():
                self.checkpoints.wait()
        self._tell()

    def _tell(self) -> None:
        for i in self._new():
            self.announced.add(i)
            seat = self.seats[i]
            if seat.error is not None or seat.said:
                self.ended(i, seat.error or TrainingDiverged(seat.said))
            else:
                step = seat.best.step if seat.settings.patience else seat.ended
                self.ended(i, Trained(self._delta(i), step, seat.log.rows, self.rows.useful_fraction(i)))

    def _delta(self, i: int) -> Delta:
        """What a member came to: with patience its best delta, otherwise the last."""
        seat = self.seats[i]
        if i not in self.places:
            raise JaxbakeError(
                f"{seat.member.name}: this bake had ended and its delta is gone; delete {self.checkpoints.folder} to "
                "bake anew"
            )
        at = self.places.index(i)
        delta = member_state(self.state, at, seat.like).delta
        if not seat.settings.patience:
            return delta
        return delta.replace(factors=cut(self.best, at, delta.config.rank, tuple(delta.factors)))


@jax.jit
def _replaced(best: dict, factors: dict, better: jax.Array) -> dict:
    return jax.tree.map(lambda new, old: jnp.where(better[:, None, None], new, old), factors, best)
