"""Asking a model many questions, each distinct one once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from jaxbake.evaluate.items import Item
from jaxbake.sampling import sample

BATCH = 64
STAGE = "evaluate"


class Progress(Protocol):
    """Called as work advances, as a bake's: stage "evaluate", and in `info` what is being asked."""

    def __call__(self, stage: str, done: int, total: int, info: dict[str, Any]) -> None: ...


def silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    """Shows nothing."""


class Part:
    """A part of some work, reported as so many of the whole: `Part(progress, 40, 100)` shows done as 40 + done."""

    def __init__(self, progress: Progress, start: int, total: int):
        self._progress, self._start, self._total = progress, start, total

    def __call__(self, stage: str, done: int, total: int, info: dict[str, Any]) -> None:
        self._progress(stage, self._start + done, self._total, info)


def ask(
    base: Any,
    delta: Any,
    items: Sequence[Item],
    *,
    system: str | None = None,
    max_tokens: int = 64,
    batch_size: int = BATCH,
    progress: Progress = silent,
    what: str = "",
) -> list[str]:
    """The greedy reply to every item, behind a system prompt if one is given (before the item's own)."""
    keys = [json.dumps(item.messages, sort_keys=True) for item in items]
    distinct = dict(zip(keys, (list(item.messages) for item in items), strict=True))
    texts = sample(base, list(distinct.values()), delta, system, max_tokens=max_tokens, batch_size=batch_size)
    replies = dict(zip(distinct, texts, strict=True))
    progress(STAGE, len(items), len(items), {"asking": what} if what else {})
    return [replies[key] for key in keys]
