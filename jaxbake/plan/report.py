"""A plan as a person reads it."""

from __future__ import annotations

from typing import Any

from jaxbake.plan.figures import Case, Figures, Plan
from jaxbake.plan.search import missing

_NAMES = {"online": "step, teacher online", "cached": "step, targets cached", "decode": "sampler, one token"}


def size(count: float | None) -> str:
    """Bytes in the unit that suits them; "-" where they are not known."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def rows_of(f: Figures) -> dict[str, str]:
    """The figures of a program, by what they are of."""
    memory = f.memory
    rows = {
        "weights": size(memory.weights),
        "delta and optimizer": size(memory.state),
        "rows, prompt, targets": size(memory.inputs),
        "activations, temporary": size(memory.temporary),
        "peak": f"{size(memory.peak)} of {size(memory.hbm)}",
        "fits": "yes" if f.fits else f"no, misses by {size(memory.over)}",
        "matmul FLOPs, all chips": f"{f.flops:.3g}",
        "estimated cycles": "-" if f.cycles is None else f"{f.cycles:.3g}",
        "of them hand-written kernels": f"{f.kernel_cycles:.3g}" if f.unestimated else "none",
        "share of the FLOP bound": "-" if f.share is None else f"{f.share:.0%}",
    }
    for kind, one in f.collectives.items():
        rows[kind] = f"{one['count']} x, {size(one['bytes'])}"
    rows["compile time"] = f"{f.compile_seconds:.0f} s"
    return rows


def render(plan: Plan) -> Any:
    """Tables of the asked-for case and of the suggestion."""
    from rich.console import Group

    request, topology = plan.request, plan.topology
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    sizes = request.sizes
    parts = [
        f"[bold]{request.name}[/bold], {plan.parameters / 1e9:.2f} B parameters in {request.dtype}, rank "
        f"{request.bake.lora.rank}, on {slices}{topology.text}: {topology.total} x {topology.chip.name}",
        f"a step: {sizes.rows} rows of {sizes.question} + {sizes.response} tokens behind a prompt of {sizes.prompt}",
        "",
        table(plan.asked, "asked for"),
    ]
    if not plan.asked.fits:
        if plan.best is not None:
            parts += ["", table(plan.best, "suggested")]
        else:
            least = min((plan.asked, *plan.tried), key=lambda case: max(f.memory.over for f in case.figures))
            parts.append(f"\nNothing that fits was found in {len(plan.tried)} tries; the nearest, {title(least)}: "
                         f"{missing(least)}. Use more chips, or fewer rows.")  # fmt: skip
    notes = remarks(plan.best or plan.asked)
    return Group(*parts, *(["", *notes] if notes else []))


def title(case: Case) -> str:
    """A case in words."""
    batches = "whole batch" if case.micro_batches == 1 else f"{case.micro_batches} micro-batches"
    return f"mesh {case.mesh}, {batches}, {'with' if case.remat else 'no'} recomputation"


def table(case: Case, what: str) -> Any:
    """One case: a column for each program."""
    from rich.table import Table

    drawn = Table(title=f"{what}: {title(case)}", title_justify="left")
    drawn.add_column("a chip")
    columns = [rows_of(f) for f in case.figures]
    for f in case.figures:
        drawn.add_column(_NAMES[f.program], justify="right")
    for name in dict.fromkeys(name for rows in columns for name in rows):
        drawn.add_row(name, *(rows.get(name, "") for rows in columns))
    return drawn


def remarks(case: Case) -> list[str]:
    """What the estimate leaves out."""
    said = []
    if waiting := [f for f in case.figures if f.waiting.get("count")]:
        counted = ", ".join(f"{f.waiting['count']} ({size(f.waiting['bytes'])}) in {f.program}" for f in waiting)
        said.append(f"The compiler gives no cycles for collectives the program waits for: {counted}.")
    if any(f.unestimated for f in case.figures):
        kernels = ", ".join(f"{f.unestimated} in {f.program}" for f in case.figures if f.unestimated)
        said.append(f"It gives none for hand-written kernels either: {kernels} runs count at the products' peak speed.")
    return said
