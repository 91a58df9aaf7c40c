"""One picture of a bake: loss and held-out KL over its steps."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxbake.errors import JaxbakeError
from jaxbake.files import as_path, write_whole

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
LOSS, KL, AGREEMENT = "#9fb3c8", "#d64545", "#0f609b"

STYLE = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have a finite value of this name."""
    found = [(row["step"], row[name]) for row in metrics if row.get(name) is not None and math.isfinite(row[name])]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Each value with the `reach` ones on either side of it averaged, as logarithms where all are above 0."""
    logs = all(v > 0 for v in values)
    levels = [math.log(v) for v in values] if logs else list(values)
    means = []
    for i in range(len(levels)):
        near = levels[max(i - reach, 0) : i + reach + 1]
        means.append(sum(near) / len(near))
    return [math.exp(m) for m in means] if logs else means


def plot(metrics: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Writes a PNG of a bake's metrics (rows with "step" and some of "loss", "held_out_kl", "held_out_agreement").

    Loss and KL share a logarithmic axis in nats per token; below them the share of held-out tokens on which baked and
    prompted model agree. Raises JaxbakeError where there is nothing to draw or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = series(metrics, "loss")
    kl_steps, kls = series(metrics, "held_out_kl")
    agreement = series(metrics, "held_out_agreement")
    if not losses and not kls:
        raise JaxbakeError(f"{path}: there are no metrics to draw")
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5.2 if agreement[0] else 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        if agreement[0]:
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
            _agreement(below, *agreement)
            last = below
        else:
            axes = last = figure.subplots()
        if losses:
            axes.plot(steps, losses, color=LOSS, linewidth=0.8, alpha=0.6)
            axes.plot(steps, smoothed(losses, len(losses) // 40), color=LOSS, linewidth=2, label="training loss")
        if kls:
            axes.plot(kl_steps, kls, color=KL, linewidth=2, marker="o", markersize=4.5, label="held-out KL", zorder=3)
            _name_ends(axes, kl_steps, kls)
        _log_scale(axes, [*losses, *kls])
        axes.set_ylabel("nats per token")
        axes.legend(loc="upper right")
        last.set_xlabel("step")
        last.xaxis.get_major_locator().set_params(integer=True)
        last.set_xlim(0, max([*steps, *kl_steps, 1]) * 1.06)
        if title:
            axes.set_title(title, loc="left", fontweight="bold", pad=12)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_whole(as_path(path), image.getvalue())


def _name_ends(axes, steps: list[float], values: list[float]) -> None:
    """Writes the first and the last value beside their points."""
    ends = {0: (8, 2, "left"), len(values) - 1: (0, 9, "center")}
    for at, (right, up, align) in ends.items():
        axes.annotate(
            f"{values[at]:.3g}", (steps[at], values[at]), (right, up), textcoords="offset points", color=KL,
            ha=align, fontweight="bold", fontsize=10,
        )  # fmt: skip


def _log_scale(axes, values: list[float]) -> None:
    """A logarithmic axis with plain numbers where the values allow one and span enough for it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if v > 0]
    if len(positive) < len(values) or max(positive) < 3 * min(positive):
        axes.set_ylim(bottom=min(0, *values))
        return
    axes.set_yscale("log")
    wide = max(positive) > 30 * min(positive)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(min(positive) / 1.5, max(positive) * 1.5)


def _agreement(axes, steps: list[float], values: list[float]) -> None:
    axes.plot(steps, [100 * v for v in values], color=AGREEMENT, linewidth=2, marker="o", markersize=4.5)
    axes.set_ylabel("same most\nlikely token")
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.set_ylim(min(50, *(100 * v - 5 for v in values)), 103)
    axes.annotate(
        f"{100 * values[-1]:.3g} %", (steps[-1], 100 * values[-1]), (0, -15), textcoords="offset points",
        color=AGREEMENT, ha="center", fontweight="bold", fontsize=10,
    )  # fmt: skip
