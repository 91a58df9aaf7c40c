"""How the command line shows things: progress while it works, tables and JSON when it is done."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

STAGES = {"write stimuli": "writing stimuli", "sample": "sampling", "bake": "baking", "evaluate": "evaluating"}


def console() -> Console:
    """Standard output, for results."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def note(text: str) -> None:
    """A line for the person at the terminal; never on standard output."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, and nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _figures(info: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in info.items())


class Bars:
    """Progress as bars on a terminal, and as a line for every tenth of a stage elsewhere; both on standard error.

    with Bars() as progress:
        run_recipe(recipe, root, output, progress)
    """

    def __init__(self):
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._tasks: dict[str, Any] = {}
        self._tenth: dict[str, int] = {}
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._live,
        )

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, info: dict[str, Any]) -> None:
        label, figures = STAGES.get(stage, stage), _figures(info)
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(label, total=total, figures="")
            fields = {"figures": figures} if figures else {}
            self._bars.update(self._tasks[stage], completed=done, total=total, **fields)
        elif (tenth := 10 * done // max(total, 1)) > self._tenth.get(stage, -1):
            self._tenth[stage] = tenth
            note(f"{label}: {done}/{total}  {figures}".rstrip())
