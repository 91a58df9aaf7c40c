#!/usr/bin/env python
"""Makes PLANS.md: real models on the TPUs they would be baked on, compiled with no TPU at hand.

    python tpu_scripts/make_plans.py --configs FOLDER [--only llama3.1-8b] [--programs online]

FOLDER holds NAME/config.json for every model below (the files of the Hugging Face hub; no weights). What is compiled
is kept in runs/plans, so that the command can be stopped and run again; `--fresh` begins anew. Some minutes a program.

    python tpu_scripts/make_plans.py --configs FOLDER --growth

makes GROWTH.md instead: what the first case costs with other numbers of rows, prompts and vocabularies.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import growth

from jaxbake.errors import JaxbakeError
from jaxbake.plan import Case, Request, request_for
from jaxbake.plan.chips import parse_topology
from jaxbake.plan.report import size
from jaxbake.plan.request import PROGRAMS, check_compiler
from jaxbake.plan.search import compile_elsewhere, read_case

CASES = (  # model, topology, slices, mesh
    ("llama3.1-8b", "v5e:4x4", 1, "fsdp=16"),
    ("llama3.1-70b", "v5p:4x4x4", 1, "fsdp=32,tp=2"),  # what auto takes (see mesh.widest_gather)
    ("llama3.1-70b", "v5p:4x4x4", 1, "fsdp=16,tp=4"),
    ("gemma3-27b", "v5p:2x2x2", 1, "fsdp=8"),
    ("qwen3-32b", "v6e:4x4", 1, "fsdp=16"),
    ("qwen3-8b", "v5e:4x4", 1, "fsdp=16"),
    ("llama3.1-8b", "v5e:4x4", 2, "replica=2,fsdp=16"),
    ("crumb", "v5e:2x2", 1, "fsdp=4"),
)
HERE = Path(__file__).resolve().parent
TITLES = {"online": "step with the teacher's pass", "cached": "step with cached targets", "decode": "sampler, a token"}
HEAD = """# Plans

What `jaxbake plan` says of real models, made by

    python tpu_scripts/make_plans.py --configs FOLDER

with the TPU compiler and no TPU: {versions}. Base in bfloat16, rank 32 on all linear layers, a
step of 64 rows of 64 question and 448 response tokens behind a prompt of 2,048, each layer recomputed in the backward
pass; the sampler decodes {decoded} rows, or one for each part of the mesh where these are more.

Memory, FLOPs and cycles are a chip's. Cycles are the compiler's own estimate, loops multiplied out. It gives none for
collectives that the program waits for (*waits*: how many, and their bytes), and none for hand-written kernels, which
are counted as what their products take at the chip's peak (*kernels*: how many run, and these cycles). Share: cycles
that the matrix products alone would take at the peak, over the cycles; the most that can be hoped for. Compile times
are of one core of a busy machine. Cases without a line have not been compiled.
"""


def describe(request: Request) -> str:
    slices = f"{request.slices} slices of " if request.slices > 1 else ""
    return f"{request.name.rpartition('/')[2] or request.name} on {slices}{request.topology}, {request.mesh}"


def row(request: Request, case: Case) -> list[str]:
    """One program's line."""
    f = case.figures[0]
    memory = f.memory
    chips = parse_topology(request.topology, request.slices).total
    moved = ", ".join(f"{kind} {one['count']} x ({size(one['bytes'])})" for kind, one in f.collectives.items())
    return [
        describe(request),
        f"{size(memory.weights)} / {size(memory.state)} / {size(memory.temporary)}",
        f"{size(memory.peak)} of {size(memory.hbm)}",
        "fits" if f.fits else f"**misses by {size(memory.over)}**",
        f"{f.flops / chips:.2e}",
        "-" if f.cycles is None else f"{f.cycles:.3e}",
        "-" if f.share is None else f"{f.share:.0%}",
        moved or "-",
        f"{f.waiting.get('count', 0)} x ({size(f.waiting.get('bytes', 0))})",
        f"{f.unestimated} ({f.kernel_cycles:.2e} cycles)" if f.unestimated else "0",
        f"{f.compile_seconds:.0f} s",
    ]


def versions() -> str:
    """Of the compiler and of what feeds it."""
    return f"jax {version('jax')}, libtpu {version('libtpu')}"


def page(done: dict[str, list[tuple[Request, Case]]]) -> str:
    """PLANS.md."""
    request = next(iter(done.values()))[0][0]
    text = HEAD.format(versions=versions(), decoded=request.bake.sampling.batch_size)
    columns = ["", "weights / delta and optimizer / temporary", "peak", "", "matmul FLOPs", "cycles", "share",
               "collectives", "waits", "kernels", "compiled in"]  # fmt: skip
    for program, cases in done.items():
        lines = [columns, ["---"] * len(columns), *(row(*one) for one in cases)]
        text += f"\n## {TITLES[program][0].upper()}{TITLES[program][1:]}\n\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="folder of NAME/config.json")
    parser.add_argument("--only", action="append", help="only this model; may be given often")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--kept", type=Path, default=HERE.parent / "runs" / "plans")
    parser.add_argument("--fresh", action="store_true", help="compile again what has been compiled")
    parser.add_argument("--growth", action="store_true", help="make GROWTH.md, not PLANS.md")
    asked = parser.parse_args()
    check_compiler()
    asked.kept.mkdir(parents=True, exist_ok=True)
    if asked.growth:
        make_growth(asked)
        return
    done: dict[str, list[tuple[Request, Case]]] = {}
    for program in PROGRAMS:
        for case in CASES:
            request = replace(ask(asked.configs, *case), programs=(program,))
            if (known := had(request, asked, wanted=case[0] in (asked.only or [case[0]]))) is not None:
                done.setdefault(program, []).append((request, known))
            if done:
                (HERE / "PLANS.md").write_text(page(done))


def make_growth(asked: argparse.Namespace) -> None:
    """GROWTH.md."""
    base, seen, done = ask(asked.configs, *CASES[0]), {}, []
    for point in growth.points(base):
        program = point.name, point.request.programs  # the case itself stands in every table
        if program not in seen:
            seen[program] = had(point.request, asked, point.name)
        if (known := seen[program]) is not None:
            done.append((point, known))
            (HERE / "GROWTH.md").write_text(growth.page(base, describe(base), versions(), done))


def ask(configs: Path, model: str, topology: str, slices: int, mesh: str) -> Request:
    """A case of the table."""
    return request_for(topology, model=model if model == "crumb" else str(configs / model), slices=slices, mesh=mesh)


def had(request: Request, asked: argparse.Namespace, name: str = "", wanted: bool = True) -> Case | None:
    """A case of one program, from what is kept or compiled now; None where it is not wanted, or could not be."""
    (program,) = request.programs
    model = request.name.rpartition("/")[2]
    where = f"{model}_{request.topology.replace(':', '-')}_{request.slices}_{request.mesh}_{program}"
    path = asked.kept / f"{where}{name and '_' + name}.json"
    if wanted and program in asked.programs and (asked.fresh or not path.exists()):
        print(f"{program}: {describe(request)} {name}", flush=True)
        try:
            path.write_text(json.dumps(asdict(compile_elsewhere(request)[0]), indent=1))
        except JaxbakeError as error:
            print(f"  {error}", flush=True)
    return read_case(json.loads(path.read_text())) if path.exists() else None


if __name__ == "__main__":
    main()
