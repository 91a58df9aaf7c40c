"""How a bake tells what it is doing."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """Called as work advances. `stage` is "write stimuli", "sample" or "bake"; `info` holds figures worth showing."""

    def __call__(self, stage: str, done: int, total: int, info: dict[str, Any]) -> None: ...


def silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    """Shows nothing."""
