"""Accuracy in the four cells: without the prompt, with it, baked, and baked with the prompt as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxbake.deltas.lora import with_strength
from jaxbake.errors import JaxbakeError
from jaxbake.evaluate.ask import Part, Progress, ask, silent
from jaxbake.evaluate.items import Item, is_correct, user

CELLS = ("base", "prompted", "baked", "baked_prompted")
NAMES = {"base": "base", "prompted": "prompted", "baked": "baked", "baked_prompted": "baked + prompted"}


def recovered(base: float, prompted: float, baked: float) -> float | None:
    """Share of the prompt's gain that the bake keeps without it; None where the prompt gains nothing."""
    return (baked - base) / (prompted - base) if prompted > base else None


@dataclass(frozen=True)
class FourCells:
    """Greedy replies to every item in each cell, and whether they are right: {cell: one per item}."""

    items: tuple[Item, ...]
    replies: dict[str, list[str]]
    right: dict[str, list[bool]]

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of right replies by cell."""
        return {cell: sum(right) / len(right) for cell, right in self.right.items()}

    @property
    def groups(self) -> dict[str, dict[str, float]]:
        """Accuracy by group of items, then cell, in the order the groups first appear."""
        found: dict[str, dict[str, float]] = {}
        for group in dict.fromkeys(item.group for item in self.items):
            mine = [i for i, item in enumerate(self.items) if item.group == group]
            found[group] = {cell: sum(right[i] for i in mine) / len(mine) for cell, right in self.right.items()}
        return found

    @property
    def recovered(self) -> float | None:
        """`recovered` over all items."""
        accuracy = self.accuracy
        return recovered(accuracy["base"], accuracy["prompted"], accuracy["baked"])

    def most_telling(self) -> int:
        """Index of an item to show: wrong without the prompt and right with it and baked, if there is one."""
        scores = [
            (right["prompted"] and not right["base"]) + 2 * (right["prompted"] and right["baked"])
            for right in ({cell: self.right[cell][i] for cell in CELLS} for i in range(len(self.items)))
        ]
        return scores.index(max(scores))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, replies included."""
        rows = [
            {
                "question": item.question,
                "answer": item.answer,
                "check": item.check,
                "group": item.group,
                "replies": {cell: self.replies[cell][i] for cell in CELLS},
                "right": {cell: self.right[cell][i] for cell in CELLS},
            }
            for i, item in enumerate(self.items)
        ]
        return {
            "items": len(self.items),
            "accuracy": self.accuracy,
            "recovered": self.recovered,
            "groups": self.groups,
            "rows": rows,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FourCells:
        """The inverse of `to_dict`; of each item's conversation only the question is known."""
        rows = data["rows"]
        return cls(
            tuple(Item(user(row["question"]), row["answer"], row["check"], row["group"]) for row in rows),
            *({cell: [row[part][cell] for row in rows] for cell in CELLS} for part in ("replies", "right")),
        )


def four_cells(
    base: Any,
    delta: Any,
    prompt: str | Sequence[str],
    items: Sequence[Item],
    *,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: Progress = silent,
) -> FourCells:
    """Asks all items in the four cells, greedily; of several prompts each behind the one it is about (`Item.prompt`).

    Raises JaxbakeError for no items, an empty prompt, and an item that names none of several prompts.
    """
    if not items:
        raise JaxbakeError("the four cells need at least one question")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not all(text.strip() for text in prompts):
        raise JaxbakeError("the four cells need the prompt that was baked; it is empty")
    about = [_about(item, len(prompts)) for item in items]
    without = with_strength(delta, 0.0)  # bit for bit the base, by the program that serves the baked model too
    ways = {
        "base": (without, False),
        "prompted": (without, True),
        "baked": (delta, False),
        "baked_prompted": (delta, True),
    }
    replies: dict[str, list[str]] = {}
    done, total = 0, len(ways) * len(items)
    for cell, (with_delta, behind) in ways.items():
        found: dict[int, str] = {}
        for number in sorted(set(about)) if behind else [None]:
            mine = [i for i in range(len(items)) if number in (None, about[i])]
            texts = ask(
                base, with_delta, [items[i] for i in mine], system=None if number is None else prompts[number],
                max_tokens=max_tokens, batch_size=batch_size, what=NAMES[cell], progress=Part(progress, done, total),
            )  # fmt: skip
            found.update(zip(mine, texts, strict=True))
            done += len(mine)
        replies[cell] = [found[i] for i in range(len(items))]
    right = {cell: [is_correct(i, r) for i, r in zip(items, replies[cell], strict=True)] for cell in CELLS}
    return FourCells(tuple(items), replies, right)


def _about(item: Item, prompts: int) -> int:
    """Which of the prompts an item is about."""
    number = 0 if item.prompt is None and prompts == 1 else item.prompt
    if number is None or number >= prompts:
        said = "does not say which" if number is None else f"names prompt {number}"
        raise JaxbakeError(
            f"question {item.question[:40]!r}: {said} of {prompts} prompts it is about; give it a 'prompt' from 0 on"
        )
    return number
