"""Accuracy of one model, not of a bake: on questions of one's own, and on all that crumb was trained for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxbake.deltas.lora import merge
from jaxbake.evaluate.ask import Progress, ask, silent
from jaxbake.evaluate.items import Item, is_correct
from jaxbake.evaluate.report import Grid, percent, to_rich


@dataclass(frozen=True)
class Scores:
    """Share of right replies: {group of questions: {how they were asked: share, or None where that makes no sense}}."""

    title: str
    questions: int
    accuracy: dict[str, dict[str, float | None]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"questions": self.questions, "accuracy": self.accuracy}

    def __rich__(self):
        columns = next(iter(self.accuracy.values()))
        rows = ((name, *map(percent, row.values())) for name, row in self.accuracy.items())
        return to_rich(Grid(self.title, ("questions", *columns), tuple(rows)))


def score_items(
    base: Any,
    delta: Any,
    items: Sequence[Item],
    *,
    system: str | None = None,
    max_tokens: int = 64,
    progress: Progress = silent,
) -> Scores:
    """Accuracy on items, all and by group, behind a system prompt if one is given."""
    replies = ask(base, delta, items, system=system, max_tokens=max_tokens, progress=progress)
    right = [is_correct(item, reply) for item, reply in zip(items, replies, strict=True)]
    groups = dict.fromkeys(item.group for item in items)
    found = {"all": {"correct": sum(right) / len(right)}}
    for group in groups if len(groups) > 1 else ():
        mine = [r for r, item in zip(right, items, strict=True) if item.group == group]
        found[group or "others"] = {"correct": sum(mine) / len(mine)}
    return Scores(base.name, len(items), found)


def score_abilities(base: Any, delta: Any = None, *, per_ability: int = 50, seed: int = 0) -> Scores:
    """Accuracy of every ability of crumb, on names and wordings it was not trained on: with the system prompt the
    question belongs to, and without it (None where it needs none). The whole greedy reply has to be right.
    """
    from jaxbake.smallworld.evaluate import TITLES, evaluate

    if delta is not None:
        base = replace(base, params=merge(base.params, delta))
    table = evaluate(base, per_ability, seed)
    columns = {"prompted": "prompted", "bare": "without the prompt"}
    found = {
        TITLES[name]: {title: None if math.isnan(row[key]) else row[key] for key, title in columns.items()}
        for name, row in table.items()
    }
    return Scores(f"{base.name}: correct answers", per_ability * len(table), found)
