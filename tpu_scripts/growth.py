"""GROWTH.md: what a step costs with other numbers of rows, prompts and vocabularies; see `make_plans.py --growth`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxbake.plan import Case, Request
from jaxbake.plan.chips import parse_topology
from jaxbake.plan.report import size

STEPS = {"online": "teacher's pass", "cached": "cached targets"}
SIZES = {"rows": (32, 64, 128), "prompt": (512, 2048, 8192), "vocabulary": (32_000, 128_256, 256_000)}
TITLES = {"rows": "Rows of a step", "prompt": "Tokens of the prompt", "vocabulary": "Tokens of the vocabulary"}
HEAD = """# Growth

What a step costs where one of its sizes is another and all else stays, made by

    python tpu_scripts/make_plans.py --configs FOLDER --growth

with the TPU compiler and no TPU: {versions}. The case is one of [PLANS.md](PLANS.md), {case}:
{sizes},
a vocabulary of {vocabulary:,} tokens. Another vocabulary is another `vocab_size` in the model's config.json.

All figures are as in PLANS.md and leave out the same: collectives that the program waits for (*waits*: how many, and
their bytes) have no cycles, and the attention's and the objective's own kernels count as what their products take at
the chip's peak (*kernels*: these cycles, which are part of *cycles*). FLOPs are a chip's. *One more* is what a row or a
token more costs in cycles, from the size above to this one: the same down a column where growth is linear. What stands
below a table was read off the operations of the compiled programs (libtpu 0.0.42).
"""
REASONS = {
    "rows": """\
Linear but for the compiler's choices: from 64 to 128 a row costs 4% (teacher's pass) and 6% (cached targets) more than
from 32 to 64. With cached targets the excess is one product of the layers' feed-forward part in the forward pass:
tiled around the weights that are gathered meanwhile, it takes 6.6e6 cycles where for half the rows it takes 1.9e6,
which is 9e7 more than twice as much in the 32 layers; all else together grows by a little less than its share.
""",
    "prompt": """\
With the teacher's pass a token of the prompt costs what attending to it does (kernels: 8,192 cycles) and little more,
at any length. The pass over the prompt itself is made once for a bake and is no part of a step. With cached targets the
prompt is not in the program, which is the same to the last cycle.
""",
    "vocabulary": """\
A token of the vocabulary costs the objective's three products with it (kernels: 336 cycles) and its part in regrouping
the unembedding, at any size. With the teacher's pass the first two lines differ by 3e7 cycles more, which are spent on
no vocabulary: beside the smallest one the compiler holds more of what the products of the teacher's pass read in fast
memory (VMEM) from one to the next, beside the larger ones in HBM.
""",
}


@dataclass(frozen=True)
class Point:
    """A program of one size; name: how that differs from the case itself, "" where it does not."""

    what: str
    value: int
    request: Request
    name: str


def points(base: Request) -> Iterator[Point]:
    """All that the tables hold; the case itself stands in each of them."""
    for what, values in SIZES.items():
        for step in STEPS:
            for value in values:
                case = replace(base, programs=(step,))
                request = _sized(case, what, value)
                yield Point(what, value, request, "" if request == case else f"{what}={value}")


def _sized(request: Request, what: str, value: int) -> Request:
    """The request with another size; another vocabulary makes another model, otherwise as it is."""
    if what == "vocabulary":
        return replace(request, model={**request.model, "vocab_size": value})
    return replace(request, sizes=replace(request.sizes, **{what: value}))


def page(base: Request, case: str, versions: str, done: list[tuple[Point, Case]]) -> str:
    """GROWTH.md: a table for each quantity, in which a step's lines follow each other."""
    n = base.sizes
    sizes = f"{n.rows} rows of {n.question} question and {n.response} response tokens behind a prompt of {n.prompt:,}"
    text = HEAD.format(versions=versions, case=case, sizes=sizes, vocabulary=base.model["vocab_size"])
    for what, title in TITLES.items():
        found = [one for one in done if one[0].what == what]
        if found:
            columns = [what, "step", "peak", "matmul FLOPs", "cycles", "one more", "share", "kernels", "waits"]
            rows = [_row(*one, last) for one, last in zip(found, [None, *found[:-1]], strict=True)]
            lines = [columns, ["---"] * len(columns), *rows]
            text += f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
            text += f"\n{REASONS[what]}"
    return text


def _row(point: Point, case: Case, before: tuple[Point, Case] | None) -> list[str]:
    f, step, more = case.figures[0], point.request.programs[0], None
    if before is not None and before[0].request.programs == point.request.programs:
        last = before[1].figures[0].cycles
        more = None if None in (f.cycles, last) else (f.cycles - last) / (point.value - before[0].value)
    return [
        f"{point.value:,}",
        STEPS[step],
        size(f.memory.peak),
        f"{f.flops / parse_topology(point.request.topology, point.request.slices).total:.2e}",
        "-" if f.cycles is None else f"{f.cycles:.3e}",
        "-" if more is None else f"{more:,.0f}",
        "-" if f.share is None else f"{f.share:.0%}",
        f"{f.kernel_cycles:.2e}",
        f"{f.waiting.get('count', 0)} x ({size(f.waiting.get('bytes', 0))})",
    ]
