"""One bake among many: what it is given, and where it stands while all are trained together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.checkpoint import Checkpoints
from jaxbake.bake.folder import MetricsLog, Runs
from jaxbake.bake.other import Other
from jaxbake.bake.step import BakeState
from jaxbake.bake.train import Best, TensorBoard, diverged
from jaxbake.config import BakeConfig
from jaxbake.data.chat import Example
from jaxbake.deltas.lora import Delta, target_slots
from jaxbake.errors import JaxbakeError, TrainingDiverged
from jaxbake.files import AnyPath
from jaxbake.models.spec import ModelConfig


@dataclass(frozen=True)
class Member:
    """One bake among many: its settings, its examples, its folder (None writes nothing), and the model that teaches all
    of them in the base's stead."""

    name: str
    config: BakeConfig
    examples: Sequence[Example]
    held_out: Sequence[Example]
    folder: AnyPath | None
    runs: Runs
    other: Other | None = None


def check_alike(members: Sequence[Any]) -> None:
    """Raises JaxbakeError where bakes (each with a name and a config) cannot share a step: loss and mesh are one."""
    first = members[0]
    for member in members[1:]:
        for what in ("loss", "teacher"):
            if getattr(member.config, what) != (said := getattr(first.config, what)):
                raise JaxbakeError(
                    f"{member.name}: bakes of one step need the same {what} settings as '{first.name}' ({said}); bake "
                    "it by itself"
                )
        if member.config.mesh != first.config.mesh:
            raise JaxbakeError(
                f"{member.name}: mesh is {member.config.mesh or 'none'}, that of '{first.name}' "
                f"{first.config.mesh or 'none'}; bakes of one step share one base, so give all the same"
            )


class Seat:
    """A member in the loop: what it has seen so far, and what it came to.

    like: a delta of its settings and slots, without arrays. said: the error it came to in an earlier run.
    """

    def __init__(self, config: ModelConfig, member: Member, resumed: int | None, seen: dict[str, Any] | None):
        self.member, self.settings = member, member.config.train
        lora = member.config.lora
        self.like = Delta(dict.fromkeys(target_slots(config, lora)), jnp.float32(lora.scale), lora)
        self.best = Best() if seen is None else Best(seen["kl"], int(seen["step"]), int(seen["since"]))
        self.ended: int | None = None if seen is None or seen["ended"] < 0 else int(seen["ended"])
        self.error: TrainingDiverged | None = None
        self.said = None if seen is None else seen["error"]
        if resumed is not None:
            member.runs.note(responses=member.runs.rows[-1]["responses"], step=resumed)
        self.log = MetricsLog(member.folder and member.folder / layout.METRICS, resumed)
        board = member.folder and self.settings.tensorboard and hosts.is_first()
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

    def failed(self, number: int, row: dict[str, float], state: BakeState) -> None:
        """Keeps the error of a step that was not finite; its last good state is kept in its own folder."""
        folder = self.member.folder
        try:
            with Checkpoints(folder / layout.CHECKPOINTS) if folder else nullcontext() as checkpoints:
                diverged(number, row, state, self.best, checkpoints, self.member.config)
        except TrainingDiverged as error:
            self.error = error
