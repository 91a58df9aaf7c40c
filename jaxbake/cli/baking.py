"""`quickstart`, `bake` and `eval`: a prompt becomes a delta, and is measured."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxbake.cli import app, show
from jaxbake.errors import JaxbakeError
from jaxbake.files import as_path

Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh", metavar="AXES", help="Devices to spread over: fsdp=8, or fsdp=4,tp=2, or auto. [default: one device]"
    ),
]
HOSTS = "Several processes (a pod)"
Pod = Annotated[
    bool, typer.Option("--pod", help="One host of a TPU pod or Slurm job; all is detected.", rich_help_panel=HOSTS)
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator", metavar="HOST:PORT", help="Address of process 0.", rich_help_panel=HOSTS,
        envvar=["JAXBAKE_COORDINATOR", "JAX_COORDINATOR_ADDRESS"],
    ),
]  # fmt: skip
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes", min=1, help="How many processes bake together.", rich_help_panel=HOSTS,
        envvar=["JAXBAKE_PROCESSES", "JAX_NUM_PROCESSES"],
    ),
]  # fmt: skip
Process = Annotated[
    int | None,
    typer.Option(
        "--process", min=0, help="Which of them this one is, from 0.", rich_help_panel=HOSTS,
        envvar=["JAXBAKE_PROCESS", "JAX_PROCESS_ID"],
    ),
]  # fmt: skip
Preemptible = Annotated[
    bool, typer.Option("--preemptible", help="Refuse to start where SIGTERM would lose work.", rich_help_panel=HOSTS)
]
PeerTimeout = Annotated[
    int,
    typer.Option(
        "--peer-timeout", min=5, help="Seconds of silence until a process is taken for dead.", rich_help_panel=HOSTS,
        envvar="JAXBAKE_PEER_TIMEOUT",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else.")]


@app.command()
def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write to.")] = "runs/quickstart",
    mesh: Mesh = None,
    as_json: Json = False,
) -> None:
    """Bake a pirate who knows five facts into the shipped model, and see what came of it.

    Uses **crumb**, the small model inside jaxbake: no network, no accelerator, some minutes on two cores.
    Ends in a table of the model without the prompt, with it, baked, and both. Interrupted, it continues when run again.

    Example:

      jaxbake quickstart
    """
    from jaxbake.run import QUICKSTART

    _bake(QUICKSTART, _meshed([], mesh), output, as_json)


@app.command()
def bake(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML; see configs/ in the repository.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; may be given often."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder to write to, or gs://... [default: the recipe's output/name]"),
    ] = None,
    mesh: Mesh = None,
    pod: Pod = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    preemptible: Preemptible = False,
    peer_timeout: PeerTimeout = 100,
    as_json: Json = False,
) -> None:
    """Bake the prompt of a recipe into its model: sample, train, evaluate, export.

    The output folder holds the delta with its card, the same delta for Hugging Face PEFT (peft/), the sampled
    trajectories, metrics.jsonl, evaluation.json, summary.md and plot.png. The same command continues an interrupted
    bake exactly where it stopped. SIGTERM makes it save and leave with exit code 75; then run it again.

    On several hosts every process runs the same command, with --pod or with --coordinator, --processes and --process;
    the output folder must be one they all see.

    --mesh says how the work is spread over the devices, and does not change the bake: fsdp splits weights and rows, tp
    heads, mlp and vocabulary, context the tokens of long rows, replica holds copies (one for each slice of a pod).
    auto: a replica for each slice, and the smallest tp at which the model divides and every device has a row.

    Examples:

      jaxbake bake configs/persona.yaml

      jaxbake bake configs/facts.yaml --set bake.lora.rank=8 --set bake.train.steps=100 --output runs/rank8

      jaxbake bake configs/qwen3_8b_persona.yaml --mesh fsdp=4,tp=2

      jaxbake bake configs/qwen3_8b_persona.yaml --mesh auto --pod --preemptible --output gs://bucket/captain
    """
    where = {"coordinator": coordinator, "processes": processes, "process": process, "pod": pod}
    where |= {"preemptible": preemptible, "peer_timeout": peer_timeout}
    _bake(recipe, _meshed(overrides or [], mesh), output, as_json, **where)


def _meshed(overrides: list[str], mesh: str | None) -> list[str]:
    return overrides if mesh is None else [*overrides, f"bake.mesh={mesh}"]


def _bake(path: Path, overrides: list[str], output: str | None, as_json: bool, **where: Any) -> None:
    from jaxbake.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    from jaxbake import hosts  # after the recipe is known to be right: this brings jax

    hosts.start(**where)
    from jaxbake.run import run_recipe

    with show.Bars() if hosts.is_first() else nullcontext() as progress:
        summary = run_recipe(recipe, path.parent, output, progress)
    if not hosts.is_first():
        return
    if as_json:
        show.print_json(summary.to_dict())
        return
    _show(summary)


def _show(outcome: Any) -> None:
    if outcome.reused:
        show.note(f"{outcome.output} already holds this bake, finished; delete the folder to make it anew.")
    show.console().print(outcome)


@app.command("bake-many")
def bake_many(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes in YAML, all for one model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of every recipe; may be given often."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder to hold a folder for each, or gs://... [default: the recipes']"),
    ] = None,
    mesh: Mesh = None,
    pod: Pod = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    preemptible: Preemptible = False,
    peer_timeout: PeerTimeout = 100,
    as_json: Json = False,
) -> None:
    """Bake the prompts of several recipes at once: trained together, one pass over the model serves them all.

    Each comes out as **jaxbake bake** makes it alone, in a folder of its own by its name. Prompts, stimuli, ranks,
    learning rates, steps and seeds may differ; the model and the loss must be the same. A bake that diverges does not
    touch the others. What is finished is left as it is, and the same command continues what was interrupted. On several
    devices and hosts it goes as **jaxbake bake** does.

    Examples:

      jaxbake bake-many prompts/*.yaml

      jaxbake bake-many configs/persona.yaml configs/facts.yaml --set bake.train.steps=100 --output runs/two

      jaxbake bake-many prompts/*.yaml --mesh auto --pod --preemptible --output gs://bucket/many
    """
    from jaxbake.recipe import load_recipe

    loaded = [(load_recipe(path, _meshed(overrides or [], mesh)), path.parent) for path in recipes]
    from jaxbake import hosts

    where = {"coordinator": coordinator, "processes": processes, "process": process, "pod": pod}
    hosts.start(**where, preemptible=preemptible, peer_timeout=peer_timeout)
    from jaxbake.run import run_recipes

    with show.Bars() if hosts.is_first() else nullcontext() as progress:
        outcomes = run_recipes(loaded, output, progress)
    if not hosts.is_first():
        return
    if as_json:
        show.print_json([outcome.to_dict() for outcome in outcomes])
        return
    for outcome in outcomes:
        _show(outcome)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A bake's output folder, or a model: crumb, a folder, a hub name.")],
    delta: Annotated[str | None, typer.Option("--delta", help="Measure the model with this delta.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Measure the model behind this prompt.")] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help='Lines of {"question": ..., "answer": ...} to ask.')
    ] = None,
    match: Annotated[
        str | None,
        typer.Option("--match", help="A right reply: exact, contains, prefix, numeric. [default: as the recipe]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Questions at most; for crumb, of each ability. [default: all, 50]"),
    ] = None,
    mesh: Mesh = None,
    as_json: Json = False,
) -> None:
    """Measure a bake, or a model.

    A bake's folder is measured again: accuracy in the four cells base / prompted / baked / baked+prompted, KL to the
    prompted model, and what the bake did to everything else; with --questions, on questions of your own.
    **crumb** without --questions gives the accuracy of every ability it was trained for.

    Examples:

      jaxbake eval runs/quickstart

      jaxbake eval runs/quickstart --questions mine.jsonl

      jaxbake eval crumb --delta runs/quickstart

      jaxbake eval crumb --system "The code of Zandek is 4821." --questions mine.jsonl
    """
    from jaxbake import run

    folder = as_path(target)
    with show.Bars() as progress:
        if (folder / run.RECIPE).exists():
            if delta or system or limit:
                raise JaxbakeError("--delta, --system and --limit go with a model; a bake's folder has its own")
            result = run.evaluate_folder(folder, questions, match, progress, mesh)
        else:
            result = run.evaluate_model(
                target, delta, system, questions, match or "contains", limit=limit, progress=progress, mesh=mesh
            )
    if as_json:
        show.print_json(result.to_dict())
    else:
        show.console().print(result)
