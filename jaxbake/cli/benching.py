"""`bench`: how fast it is, alone and beside others."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxbake.bench.sizes import Shape, make_shape
from jaxbake.cli import app, show
from jaxbake.errors import JaxbakeError
from jaxbake.files import write_whole

bench = typer.Typer(
    help="Measure speed and memory: of a bake step, of its parts, and beside other tools.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compiling is measured too


Size = Annotated[
    str | None, typer.Option("--size", help="S (the default), M or L; the options below change single fields.")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="A config.json of Hugging Face, or its folder, instead of a size.")
]
Number = Annotated[int | None, typer.Option(min=1, show_default=False)]
PromptLen = Annotated[int | None, typer.Option(min=0, show_default=False)]
Rank = Annotated[int, typer.Option(min=1, help="Of the delta, on all linear layers.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Steps = Annotated[int, typer.Option(min=1, help="Timed, after the warm-up.")]
Warmup = Annotated[int, typer.Option(min=1)]
Seed = Annotated[int, typer.Option()]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else.")]

Timing = Result = dict[str, Any]

_SHOWN = (
    ("response_tokens_per_s", "response tokens a second", "{:,.0f}"),
    ("tokens_per_s", "tokens a second", "{:,.0f}"),
    ("gb_per_s", "GB a second", "{:.2f}"),
    ("plain_reading_gb_per_s", "GB a second, read plainly", "{:.2f}"),
    ("median_step_s", "seconds a step, median", "{:.4f}"),
    ("median_call_s", "seconds a call, median", "{:.4f}"),
    ("spread", "spread (quartiles over median)", "{:.1%}"),
    ("median_step_cpu_s", "processor seconds a step", "{:.4f}"),
    ("median_call_cpu_s", "processor seconds a call", "{:.4f}"),
    ("compile_s", "compiled in, seconds", "{:.1f}"),
    ("first_call_s", "first call, seconds", "{:.1f}"),
    ("peak_mb", "peak memory, MB", "{:,.0f}"),
    ("temporary_mb", "of it the step's own, MB", "{:,.0f}"),
    ("matmul_gflop", "matrix products done, GFLOP", "{:,.1f}"),
    ("necessary_gflop", "matrix products needed, GFLOP", "{:,.1f}"),
    ("measured_peak_gflops", "machine's measured peak, GFLOP/s", "{:,.0f}"),
    ("share_of_peak_done", "share of it, of what was done", "{:.1%}"),
    ("share_of_peak", "share of it, of what was needed", "{:.1%}"),
    ("ratio", "times the step of one delta with as many tokens", "{:.2f}"),
    ("cpu_ratio", "the same in processor time", "{:.2f}"),
    ("useful_fraction", "row tokens that are no padding", "{:.1%}"),
)


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        show.print_json(result)
        return
    from rich.table import Table

    title = " · ".join(str(result[k]) for k in ("tool", "mode", "version", "dtype", "device", "mesh") if k in result)
    grid = Table(title=f"{title} · {result['threads']} threads", show_header=False)
    for key, name, form in _SHOWN:
        if key in result:
            grid.add_row(name, form.format(result[key]))
    show.console().print(grid)


def measures(*names: str, steps: int, warmup: int) -> Callable[[Callable], Callable]:
    """Makes a command of a function (model config, shape, timing, options of its own) -> what was measured.

    The command has --size, --config and an option for each of these fields of `bench.sizes.Shape` (all by default)
    before its own options, and after them those of all benchmarks, with these numbers of steps: they are `timing`.
    """
    shaping = {"size": Size, "config": Config}
    for name in names or [field.name for field in fields(Shape)]:
        shaping[name] = PromptLen if name == "prompt_len" else Number
    timing = {"dtype": (Dtype, "float32"), "steps": (Steps, steps), "warmup": (Warmup, warmup), "seed": (Seed, 0)}

    def decorate(function: Callable) -> Callable:
        def option(name: str, kind: Any, default: Any) -> inspect.Parameter:
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[3:]
        options = [option(name, kind, None) for name, kind in shaping.items()]
        options += [option(parameter.name, parameter.annotation, parameter.default) for parameter in own]
        options += [option(name, *of) for name, of in timing.items()] + [option("as_json", Json, False)]

        @wraps(function)
        def command(as_json: bool, **given: Any) -> None:
            model, shape = _shape(**{name: given.pop(name) for name in shaping})
            _show(function(model, shape, {name: given.pop(name) for name in timing}, **given), as_json)

        command.__signature__ = inspect.Signature(options)
        command.__annotations__ = {option.name: option.annotation for option in options}
        return command

    return decorate


def _shape(size: str | None, config: Path | None, **changes: int | None) -> tuple[Any, Shape]:
    """The model's config and the shape."""
    from jaxbake.bench.shape import model_config

    shape = make_shape(size, changes)
    if config is not None and not config.exists():
        raise JaxbakeError(f"--config {config}: there is no such file or folder")
    return model_config(shape, config), shape


@bench.command()
@measures(steps=10, warmup=3)
def step(
    model: Any,
    shape: Shape,
    timing: Timing,
    rank: Rank = 16,
    online: Annotated[
        bool, typer.Option("--online", help="With the teacher's pass; otherwise its targets are known.")
    ] = False,
    mixed: Annotated[bool, typer.Option("--mixed", help="Questions and responses of many lengths, packed.")] = False,
    remat: Annotated[bool, typer.Option("--remat", help="Recompute each layer in the backward pass.")] = False,
    mesh: Annotated[
        str | None, typer.Option("--mesh", help="All devices, as fsdp=4,tp=2 or auto. [default: one device]")
    ] = None,
) -> Result:
    """A whole bake step at steady state, on random weights and tokens.

    Examples:

      jaxbake bench step --size M

      jaxbake bench step --size M --prompt-len 4096 --online --json

      jaxbake bench step --config Qwen3-0.6B/config.json --dtype bfloat16 --batch 16 --mesh auto
    """
    from jaxbake.bench.step import bench_step

    return bench_step(model, shape, rank=rank, **timing, online=online, mixed=mixed, remat=remat, mesh=mesh)


@bench.command()
@measures("hidden", "vocab", "response_len", "batch", steps=10, warmup=2)
def kl(
    model: Any,
    shape: Shape,
    timing: Timing,
    divergence: Annotated[str, typer.Option(help="forward, reverse, jsd or cross_entropy.")] = "forward",
    plain: Annotated[bool, typer.Option("--plain", help="The plain version, which holds all logits.")] = False,
    chunk_size: Number = None,
) -> Result:
    """The divergence alone, value and gradient, from hidden states of `batch x response-len` tokens.

    Example:

      jaxbake bench kl --size L --divergence reverse
    """
    from jaxbake.bench.parts import bench_kl

    return bench_kl(model, shape, **timing, divergence=divergence, plain=plain, chunk_size=chunk_size)


@bench.command()
@measures(steps=5, warmup=1)
def sample(model: Any, shape: Shape, timing: Timing) -> Result:
    """Sampling `response-len` tokens for `batch` rows behind one shared prompt; the prompt's own pass is timed too.

    Example:

      jaxbake bench sample --size M --batch 16 --response-len 64
    """
    from jaxbake.bench.parts import bench_sample

    return bench_sample(model, shape, **timing)


@bench.command()
@measures("layers", "hidden", "ffn", "vocab", steps=3, warmup=1)
def load(model: Any, shape: Shape, timing: Timing) -> Result:
    """Reading a model of this shape from safetensors, beside reading the same bytes plainly.

    Example:

      jaxbake bench load --size L
    """
    from jaxbake.bench.parts import bench_load

    return bench_load(model, **timing)


@bench.command()
@measures(*(field.name for field in fields(Shape) if field.name != "batch"), steps=5, warmup=2)
def many(
    model: Any,
    shape: Shape,
    timing: Timing,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step of each delta.")] = 1,
    members: Annotated[int, typer.Option(min=1, help="Deltas trained together.")] = 32,
    rank: Rank = 16,
) -> Result:
    """The step of many bakes together, and the step of one bake over as many tokens, in turn; targets are known.

    Example:

      jaxbake bench many --size M --members 32
    """
    from jaxbake.bench.many import bench_many

    return bench_many(model, replace(shape, batch=batch), members=members, rank=rank, **timing)


@bench.command()
def compare(
    ours: Annotated[
        list[str] | None, typer.Argument(help="With --rival: our bench and its options, after --, as: -- step --size M")
    ] = None,
    rival: Annotated[
        str | None, typer.Option("--rival", help="A command line that prints a JSON object with its tokens a second.")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option("--peers", help="A folder with torch_bake.py, trl_bake.py and hf_generate.py.")
    ] = None,
    sizes: Annotated[str, typer.Option("--sizes", help="Of the table with --peers.")] = "S,M,L",
    python: Annotated[str | None, typer.Option("--python", help="The peers' interpreter. [default: this one]")] = None,
    trl: Annotated[bool, typer.Option(help="Whether to run trl_bake.py, which needs trl.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each side. [default: all]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Every command runs once a round, in turn.")] = 2,
    steps: Steps = 5,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the table, and every command with its figures, there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ours and theirs in turn, each in a process of its own on the same processors, and the ratios.

    Examples:

      jaxbake bench compare --peers peers --threads 2

      jaxbake bench compare --rival "python torch_bake.py --size M --threads 2" -- step --size M
    """
    from jaxbake.bench import compare as comparing
    from jaxbake.bench.clock import threads as available

    threads = threads or available()
    if (rival is None) == (peers is None):
        raise JaxbakeError("give --rival with a command line, or --peers with a folder of scripts")
    if peers is not None:
        import sys

        names = [name.strip() for name in sizes.split(",")]
        commands, lines = comparing.table(
            peers, names, python=python or sys.executable, threads=threads, steps=steps, trl=trl
        )
    else:
        commands, lines = comparing.against(ours or ["step", "--steps", str(steps)], rival)
    results = comparing.run(commands, rounds, threads, show.note)
    found = comparing.rows(results, lines)
    if as_json:
        show.print_json({"threads": threads, "rounds": rounds, "lines": found, "results": results})
    else:
        from rich.table import Table

        grid = Table("", "ours", "theirs", "ratio", "wanted", "")
        for row in found:
            grid.add_row(row["line"], *comparing.cells(row))
        show.console().print(grid)
    if markdown is not None:  # last, so that nothing measured is lost with a file that cannot be written
        write_whole(markdown, comparing.page(found, commands, results))
