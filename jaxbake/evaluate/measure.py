"""All that is measured about one bake, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxbake.data.chat import Example
from jaxbake.evaluate.ask import Part, Progress, silent
from jaxbake.evaluate.cells import FourCells, four_cells
from jaxbake.evaluate.fidelity import Fidelity, fidelity
from jaxbake.evaluate.items import Item
from jaxbake.evaluate.retention import Material, Retention, retention


@dataclass(frozen=True)
class Evaluation:
    """The measurements there are; None for those without material."""

    cells: FourCells | None = None
    fidelity: Fidelity | None = None
    retention: Retention | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        parts = {"cells": self.cells, "fidelity": self.fidelity, "retention": self.retention}
        return {name: None if part is None else part.to_dict() for name, part in parts.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The inverse of `to_dict`, other entries ignored; of each item's conversation only the question is known."""
        kinds = {"cells": FourCells, "fidelity": Fidelity, "retention": Retention}
        return cls(**{name: kind.from_dict(data[name]) for name, kind in kinds.items() if data[name] is not None})


def measure(
    base: Any,
    delta: Any,
    prompt: str | Sequence[str],
    *,
    items: Sequence[Item] = (),
    examples: Sequence[Example] = (),
    material: Material | None = None,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: Progress = silent,
) -> Evaluation:
    """Measures a bake on whatever is given.

    Args:
      prompt: the baked one, or several; what is measured behind "the" prompt beside the cells is so behind the first.
      items: questions the prompt answers, for the four cells.
      examples: held-out examples of the bake, for the KL to the prompted model.
      material: what retention is measured on.
      max_tokens: longest reply.
      progress: called with stage "evaluate" and the number of questions asked so far, of all.
    """
    options = {"max_tokens": max_tokens, "batch_size": batch_size}
    total = 4 * len(items) + (material.questions if material else 0)
    cells = kept = None
    if items:
        cells = four_cells(base, delta, prompt, items, progress=Part(progress, 0, total), **options)
    if material and material.questions:
        part = Part(progress, 4 * len(items), total)
        first = prompt if isinstance(prompt, str) else prompt[0]
        kept = retention(base, delta, first, material, progress=part, **options)
    near = fidelity(base, delta, examples) if examples else None
    return Evaluation(cells, near, kept)
