"""Measurements for people: tables on the terminal and the same ones in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxbake.evaluate.cells import CELLS, NAMES, FourCells, recovered
from jaxbake.evaluate.fidelity import Fidelity
from jaxbake.evaluate.measure import Evaluation
from jaxbake.evaluate.retention import Retention

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table of texts: the first column names the row, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def percent(share: float | None) -> str:
    """A share as "97.5 %", "100 %"; "-" for none."""
    if share is None or share != share:
        return "-"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def points(change: float) -> str:
    """A difference of shares as "+1.5", in points of a hundred."""
    text = f"{100 * change:+.1f}".removesuffix(".0")
    return "0" if text in ("+0", "-0") else text


def figure(value: float) -> str:
    """A number to three digits that matter: 2.22, 0.0213, 4.1e-05."""
    return f"{value:.3g}"


def cells_grid(cells: FourCells) -> Grid:
    """Accuracy in the four cells, for all items and by group, and how much of the prompt's gain was recovered."""
    groups = cells.groups
    parts = {f"all {len(cells.items)}": cells.accuracy}
    if len(groups) > 1:
        counts = {name: sum(item.group == name for item in cells.items) for name in groups}
        parts |= {f"{name or 'others'} ({counts[name]})": accuracy for name, accuracy in groups.items()}
    rows = [
        (name, *(percent(row[c]) for c in CELLS), percent(recovered(row["base"], row["prompted"], row["baked"])))
        for name, row in parts.items()
    ]
    return Grid(
        "Questions answered correctly",
        ("questions", *(NAMES[cell] for cell in CELLS), "recovered"),
        tuple(rows),
        "recovered = (baked - base) / (prompted - base)",
    )


def fidelity_grid(fidelity: Fidelity) -> Grid:
    """Distance to the prompted model before and after."""

    def change(before: float, after: float) -> str:
        return "-" if before <= 0 else f"{100 * (after / before - 1):+.1f} %"

    f = fidelity
    rows = (
        ("KL, nats a token", figure(f.kl_before), figure(f.kl_after), change(f.kl_before, f.kl_after)),
        (
            "KL, first token",
            figure(f.first_kl_before),
            figure(f.first_kl_after),
            change(f.first_kl_before, f.first_kl_after),
        ),
        (
            "same most likely token",
            percent(f.agreement_before),
            percent(f.agreement_after),
            points(f.agreement_after - f.agreement_before) + " points",
        ),
    )
    return Grid(
        "Distance to the prompted model",
        (f"on {f.tokens} held-out tokens", "base", "baked", "change"),
        rows,
    )


def retention_grid(retention: Retention) -> Grid:
    """What became of abilities the prompt does not touch; `kept against` is what the change is counted from."""
    labels = (
        ("abilities", "abilities in the weights", "base"),
        ("unknowns", '"I do not know" where right', "prompted"),
        ("other_prompts", "another prompt is read", "base"),
    )
    rows = []
    for name, label, against in labels:
        if found := getattr(retention, name):
            rows.append(
                (
                    f"{label} ({retention.counts[name]})",
                    percent(found["base"]),
                    percent(found.get("prompted")),
                    percent(found["baked"]),
                    f"{points(found['baked'] - found[against])} to {against}",
                )
            )
    if retention.unrelated_kl is not None:
        label = f"KL to the base, unrelated ({retention.counts['unrelated']})"
        rows.append((label, "0", "-", figure(retention.unrelated_kl), "nats a token"))
    return Grid("What the prompt is not about", ("", "base", "prompted", "baked", "points"), tuple(rows))


def grids(evaluation: Evaluation) -> list[Grid]:
    """A table for every part that was measured."""
    parts = (
        (evaluation.cells, cells_grid),
        (evaluation.fidelity, fidelity_grid),
        (evaluation.retention, retention_grid),
    )
    return [make(part) for part, make in parts if part is not None]


def to_rich(grid: Grid) -> Table:
    """The table for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=grid.title, caption=grid.note or None, box=box.SIMPLE_HEAD, title_justify="left",
        caption_justify="left", title_style="bold", header_style="dim", pad_edge=False,
    )  # fmt: skip
    for i, column in enumerate(grid.columns):
        strong = column in ("baked", "recovered")
        table.add_column(column, justify="right" if i else "left", style="bold green" if strong else None)
    for row in grid.rows:
        table.add_row(*row)
    return table


def to_markdown(grid: Grid) -> str:
    """The table in Markdown, under a heading."""
    rule = ["---", *["---:"] * (len(grid.columns) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (grid.columns, rule, *grid.rows)]
    lines = [f"## {grid.title}", "", *(f"| {' | '.join(row)} |" for row in escaped)]
    return "\n".join(lines + (["", grid.note] if grid.note else []))


def side_by_side(cells: FourCells, index: int | None = None):
    """One question with its reply in every cell, as a rich panel; by default the most telling one."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    index = cells.most_telling() if index is None else index
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for cell in CELLS:
        mark = Text("✓ ", "green") if cells.right[cell][index] else Text("✗ ", "red")
        table.add_row(NAMES[cell], mark + Text(cells.replies[cell][index].strip() or "(nothing)", "default"))
    title = Text(cells.items[index].question, "bold")
    return Panel(table, title=title, title_align="left", expand=False, padding=(1, 2))


def side_by_side_markdown(cells: FourCells, index: int | None = None) -> str:
    """One question with its reply in every cell, in Markdown."""
    index = cells.most_telling() if index is None else index
    lines = ["## One question", "", f"> {_line(cells.items[index].question)}", ""]
    for cell in CELLS:
        right = "right" if cells.right[cell][index] else "wrong"
        lines.append(f"- **{NAMES[cell]}** ({right}): {_line(cells.replies[cell][index]) or '(nothing)'}")
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def render(evaluation: Evaluation) -> Group:
    """Everything that was measured, for a rich console."""
    from rich.console import Group

    parts: list = [to_rich(grid) for grid in grids(evaluation)]
    if evaluation.cells is not None:
        parts.append(side_by_side(evaluation.cells))
    return Group(*parts)


def summary_markdown(title: str, evaluation: Evaluation, more: Sequence[str] = ()) -> str:
    """The text of `summary.md`: a title, the tables, one question side by side, and further paragraphs."""
    parts = [f"# {title}", *(to_markdown(grid) for grid in grids(evaluation))]
    if evaluation.cells is not None:
        parts.append(side_by_side_markdown(evaluation.cells))
    return "\n\n".join([*parts, *more]) + "\n"
