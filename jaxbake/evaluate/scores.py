"""Accuracy of one model, not of a bake: on questions of one's own, and on all that crumb was trained for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxbake.evaluate.ask import Part, Progress, ask, silent
from jaxbake.evaluate.items import Item, from_smallworld, is_correct
from jaxbake.evaluate.report import Grid, percent, to_rich

PROMPTED, UNPROMPTED = "with its prompt", "without"
_LONGEST = 96  # the longest answers of crumb's world, sums with steps, have fewer than 70 tokens


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
        rows = ((name.replace("_", " "), *map(percent, row.values())) for name, row in self.accuracy.items())
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


def score_abilities(
    base: Any, delta: Any = None, *, per_ability: int = 50, seed: int = 0, progress: Progress = silent
) -> Scores:
    """Accuracy of every ability of crumb, on names and wordings it was not trained on: with the system prompt the
    question belongs to, and without it (None where there is none). The whole reply has to be right.
    """
    from jaxbake.smallworld.items import EVAL_FAMILIES, evaluation_items

    items = [item for name in EVAL_FAMILIES for item in from_smallworld(evaluation_items(name, per_ability, seed))]
    prompted = [item for item in items if item.messages[0]["role"] == "system"]
    many = {name for name, count in Counter(i.group for i in prompted).items() if 2 * count > per_ability}
    bare = [replace(item, messages=item.messages[1:]) for item in prompted if item.group in many]
    total = len(items) + len(bare)
    found: dict[str, dict[str, float | None]] = {name: {PROMPTED: None, UNPROMPTED: None} for name in EVAL_FAMILIES}
    for way, asked, start in ((PROMPTED, items, 0), (UNPROMPTED, bare, len(items))):
        part = Part(progress, start, total)
        replies = ask(base, delta, asked, max_tokens=_LONGEST, progress=part, what=way)
        right = [(item.group, is_correct(item, reply)) for item, reply in zip(asked, replies, strict=True)]
        for name in {item.group for item in asked}:
            mine = [r for group, r in right if group == name]
            found[name][way] = sum(mine) / len(mine)
    return Scores(f"{base.name}: correct answers", total, found)
