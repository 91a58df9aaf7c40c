"""`merge`, `export`, `check` and `models`: take a delta elsewhere, and what it can be made for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxbake.cli import app, show
from jaxbake.errors import JaxbakeError

options = {"no_args_is_help": True, "rich_markup_mode": "markdown"}
export = typer.Typer(help="Write a delta for other tools: a PEFT adapter, or a merged model.", **options)
check = typer.Typer(help="Tell beforehand what another tool would say to an adapter.", **options)
app.add_typer(export, name="export")
app.add_typer(check, name="check")

Delta = Annotated[str, typer.Argument(help="A bake's output folder, its delta/, or a PEFT adapter folder.")]
Out = Annotated[str, typer.Argument(help="Folder to write, or gs://...")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="The base it was baked on. [default: as the delta's card says]")
]


def _load(model: str | None, folder: str):
    """The base, the delta and its card."""
    import jaxbake as jb
    from jaxbake.bakery.store import read_card

    if model is None:
        try:
            model = read_card(folder).base
        except JaxbakeError as error:
            raise JaxbakeError(f"{error}; without a card, name the base with --model") from error
    base = jb.load(model)
    return base, *jb.load_delta(folder, base)


def _merge(model: str | None, delta: str, out: str) -> None:
    import jaxbake as jb

    base, change, card = _load(model, delta)
    jb.save_merged(base, change, out, card=card)
    print(out)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="crumb, a folder in Hugging Face format, or a hub name.")],
    delta: Delta,
    out: Out,
) -> None:
    """Add a delta into its base's weights and write a whole model in Hugging Face format.

    Example:

      jaxbake merge crumb runs/quickstart runs/pirate-model
    """
    _merge(model, delta, out)


@export.command()
def peft(delta: Delta, out: Out, model: Model = None) -> None:
    """A PEFT adapter folder: adapter_config.json, adapter_model.safetensors and a model card.

    Example:

      jaxbake export peft runs/quickstart runs/pirate-adapter
    """
    import jaxbake as jb

    base, change, card = _load(model, delta)
    jb.save_peft(change, base, out, card=card)
    print(out)


@export.command()
def merged(delta: Delta, out: Out, model: Model = None) -> None:
    """A whole model with the delta added in; as `jaxbake merge`, the base taken from the delta's card.

    Example:

      jaxbake export merged runs/quickstart runs/pirate-model
    """
    _merge(model, delta, out)


@check.command()
def vllm(
    adapter: Annotated[Path, typer.Argument(help="A PEFT adapter folder.")],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Folder of the base, to check the tensors' names against.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")] = False,
) -> None:
    """Name what vLLM would refuse in an adapter, or silently ignore. Exit code 1 where there is any of that.

    Example:

      jaxbake check vllm runs/quickstart/peft
    """
    import dataclasses

    from jaxbake.deltas.vllm import check_vllm

    findings = check_vllm(adapter, model)
    bad = [finding for finding in findings if finding.severity != "note"]
    if as_json:
        show.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.severity}: {finding.field}: {finding.message}; {finding.fix}")
        if not bad:
            print(f"{adapter}: vLLM would refuse or ignore nothing")
    if bad:
        raise typer.Exit(1)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")] = False,
) -> None:
    """The model families jaxbake can load, by the `model_type` of their config.json.

    Example:

      jaxbake models
    """
    from jaxbake.models.families import FAMILIES

    rows = [{"model_type": name, "family": f.title, "examples": f.examples} for name, f in FAMILIES.items()]
    if as_json:
        show.print_json(rows)
        return
    from rich.table import Table

    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*row.values())
    show.console().print(table)
