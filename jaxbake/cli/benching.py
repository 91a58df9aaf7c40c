"""`bench`: how fast it is, alone and beside others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxbake.cli import app, show
from jaxbake.errors import JaxbakeError

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


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show.print_json(result)
        return
    from rich.table import Table

    title = " · ".join(str(result[k]) for k in ("tool", "mode", "version", "dtype", "device") if k in result)
    grid = Table(title=f"{title} · {result['threads']} threads", show_header=False)
    for key, name, form in _SHOWN:
        if key in result:
            grid.add_row(name, form.format(result[key]))
    show.console().print(grid)


def _shape(config: Path | None, size: str | None, **changes: int | None):
    """The shape and the model's config."""
    from jaxbake.bench.shape import make_shape, model_config

    shape = make_shape(size, changes)
    if config is not None and not config.exists():
        raise JaxbakeError(f"--config {config}: there is no such file or folder")
    return model_config(shape, config), shape


@bench.command()
def step(
    size: Size = None,
    config: Config = None,
    layers: Number = None,
    hidden: Number = None,
    heads: Number = None,
    kv_heads: Number = None,
    ffn: Number = None,
    vocab: Number = None,
    prompt_len: PromptLen = None,
    question_len: Number = None,
    response_len: Number = None,
    batch: Number = None,
    rank: Rank = 16,
    dtype: Dtype = "float32",
    steps: Steps = 10,
    warmup: Warmup = 3,
    seed: Seed = 0,
    online: Annotated[
        bool, typer.Option("--online", help="With the teacher's pass; otherwise its targets are known.")
    ] = False,
    mixed: Annotated[bool, typer.Option("--mixed", help="Questions and responses of many lengths, packed.")] = False,
    remat: Annotated[bool, typer.Option("--remat", help="Recompute each layer in the backward pass.")] = False,
    as_json: Json = False,
) -> None:
    """A whole bake step at steady state, on random weights and tokens.

    Examples:

      jaxbake bench step --size M

      jaxbake bench step --size M --prompt-len 4096 --online --json

      jaxbake bench step --config Qwen3-0.6B/config.json --dtype bfloat16 --batch 16
    """
    model, shape = _shape(
        config, size, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        prompt_len=prompt_len, question_len=question_len, response_len=response_len, batch=batch,
    )  # fmt: skip
    from jaxbake.bench.step import bench_step

    options = {"rank": rank, "dtype": dtype, "steps": steps, "warmup": warmup, "seed": seed}
    _show(bench_step(model, shape, **options, online=online, mixed=mixed, remat=remat), as_json)


@bench.command()
def kl(
    size: Size = None,
    config: Config = None,
    hidden: Number = None,
    vocab: Number = None,
    response_len: Number = None,
    batch: Number = None,
    dtype: Dtype = "float32",
    divergence: Annotated[str, typer.Option(help="forward, reverse, jsd or cross_entropy.")] = "forward",
    plain: Annotated[bool, typer.Option("--plain", help="The plain version, which holds all logits.")] = False,
    chunk_size: Number = None,
    steps: Steps = 10,
    warmup: Warmup = 2,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The divergence alone, value and gradient, from hidden states of `batch x response-len` tokens.

    Example:

      jaxbake bench kl --size L --divergence reverse
    """
    model, shape = _shape(config, size, hidden=hidden, vocab=vocab, response_len=response_len, batch=batch)
    from jaxbake.bench.parts import bench_kl

    options = {"dtype": dtype, "steps": steps, "warmup": warmup, "seed": seed}
    _show(bench_kl(model, shape, **options, divergence=divergence, plain=plain, chunk_size=chunk_size), as_json)


@bench.command()
def sample(
    size: Size = None,
    config: Config = None,
    layers: Number = None,
    hidden: Number = None,
    heads: Number = None,
    kv_heads: Number = None,
    ffn: Number = None,
    vocab: Number = None,
    prompt_len: PromptLen = None,
    question_len: Number = None,
    response_len: Number = None,
    batch: Number = None,
    dtype: Dtype = "float32",
    steps: Steps = 5,
    warmup: Warmup = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Sampling `response-len` tokens for `batch` rows behind one shared prompt; the prompt's own pass is timed too.

    Example:

      jaxbake bench sample --size M --batch 16 --response-len 64
    """
    model, shape = _shape(
        config, size, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        prompt_len=prompt_len, question_len=question_len, response_len=response_len, batch=batch,
    )  # fmt: skip
    from jaxbake.bench.parts import bench_sample

    _show(bench_sample(model, shape, dtype=dtype, steps=steps, warmup=warmup, seed=seed), as_json)


@bench.command()
def load(
    size: Size = None,
    config: Config = None,
    layers: Number = None,
    hidden: Number = None,
    ffn: Number = None,
    vocab: Number = None,
    dtype: Dtype = "float32",
    steps: Steps = 3,
    warmup: Warmup = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Reading a model of this shape from safetensors, beside reading the same bytes plainly.

    Example:

      jaxbake bench load --size L
    """
    model, _ = _shape(config, size, layers=layers, hidden=hidden, ffn=ffn, vocab=vocab)
    from jaxbake.bench.parts import bench_load

    _show(bench_load(model, dtype=dtype, steps=steps, warmup=warmup, seed=seed), as_json)


@bench.command()
def many(
    size: Size = None,
    config: Config = None,
    layers: Number = None,
    hidden: Number = None,
    heads: Number = None,
    kv_heads: Number = None,
    ffn: Number = None,
    vocab: Number = None,
    prompt_len: PromptLen = None,
    question_len: Number = None,
    response_len: Number = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step of each delta.")] = 1,
    members: Annotated[int, typer.Option(min=1, help="Deltas trained together.")] = 32,
    rank: Rank = 16,
    dtype: Dtype = "float32",
    steps: Steps = 5,
    warmup: Warmup = 2,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The step of many bakes together, and the step of one bake over as many tokens, in turn; targets are known.

    Example:

      jaxbake bench many --size M --members 32
    """
    model, shape = _shape(
        config, size, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, vocab=vocab,
        prompt_len=prompt_len, question_len=question_len, response_len=response_len, batch=batch,
    )  # fmt: skip
    from jaxbake.bench.many import bench_many

    options = {"rank": rank, "dtype": dtype, "steps": steps, "warmup": warmup, "seed": seed}
    _show(bench_many(model, shape, members=members, **options), as_json)


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
        return
    from rich.table import Table

    grid = Table("", "ours", "theirs", "ratio", "wanted", "")
    for row in found:
        theirs = "" if row["theirs"] is None else f"{row['theirs']:,.4g}"
        wanted = "" if row["wanted"] is None else f"{'<=' if row['most'] else '>='} {row['wanted']:g}"
        mark = "" if row["wanted"] is None else "met" if row["met"] else "NOT MET"
        grid.add_row(row["line"], f"{row['ours']:,.4g}", theirs, f"{row['ratio']:.2f}", wanted, mark)
    show.console().print(grid)
