"""Checkpoints of a bake in progress: delta, optimizer, random key, cursor; asynchronous, atomic, the last two kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxbake.bake.step import BakeState
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, absolute


class Checkpoints:
    """A folder of Orbax checkpoints, a sub-folder per step; a context manager that waits for the last one.

    Of several processes all must call everything here; each writes what its devices hold. Orbax writes under another
    name and renames (in an object store: writes a marker last), so a step that can be seen is whole; what a killed run
    left half written is removed when the folder is opened next.
    """

    def __init__(self, folder: AnyPath):
        self.folder = absolute(folder)
        with self._writing():
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(2),
                cleanup_tmp_directories=True,
            )
        # Orbax asks for preemption at every save, by a count of its own: a SIGTERM just then would never reach ours.
        self._checkpointer._manager.reached_preemption = lambda step: False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        with self._writing():
            self._checkpointer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JaxbakeError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return max(self.steps, default=None)

    def save(self, state: BakeState, best: dict, cursor: dict[str, float]) -> None:
        """Starts writing the state under its step; the arrays are copied now, for the next step takes their memory.

        best: factors of the best evaluation so far, or {}. cursor: numbers the loop carries beside the state.
        """
        step = int(state.step)
        if step in self.steps:
            return
        arrays = jax.tree.map(jnp.copy, {"state": state, "best": best})
        with self._writing():
            self._checkpointer.save_checkpointables_async(step, {"arrays": arrays, "cursor": cursor}, force=True)

    def wait(self) -> None:
        """Returns once everything is on disk."""
        with self._writing():
            self._checkpointer.wait()

    def cursor(self) -> dict[str, Any]:
        """The newest checkpoint's cursor, without its arrays. Raises JaxbakeError where its file is damaged."""
        with self._reading():
            return self._checkpointer.load_checkpointables(self.latest, {"cursor": None})["cursor"]

    def restore(self, state: BakeState, best: dict) -> tuple[BakeState, dict, dict[str, float]]:
        """The newest checkpoint as (state, best, cursor), shaped and placed as those given.

        Raises JaxbakeError where its files are damaged.
        """
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"state": state, "best": best}
        )
        with self._reading():
            found: Any = self._checkpointer.load_checkpointables(self.latest, {"arrays": like, "cursor": None})
        return found["arrays"]["state"], found["arrays"]["best"], found["cursor"]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            older = self.steps[:-1]
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise JaxbakeError(
                f"{self.folder / str(self.latest)}: the checkpoint is damaged ({first}); delete this folder to go on "
                f"from {f'step {older[-1]}' if older else 'the start of training'}"
            ) from error
