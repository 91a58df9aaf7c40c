"""`plan`: what a bake would take on a TPU, before there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxbake.cli import app, show


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML; or none, with --model.")] = None,
    topology: Annotated[
        str, typer.Option("--topology", help="Chips of a slice: v5e:4x4, v6e:8x8, v5p:2x2x2, ...")
    ] = "v5e:4x4",
    slices: Annotated[int, typer.Option("--slices", help="Such slices, joined by the data centre's network.")] = 1,
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="AXES", help="As fsdp=8,tp=2; or auto. [default: the recipe's, else auto]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Another model than the recipe's: hub name, folder or config.json.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt-len", help="Tokens of the prompt. [default: 2048]", show_default=False)
    ] = None,
    question: Annotated[
        int | None, typer.Option("--question-len", help="Tokens of a question. [default: 64]", show_default=False)
    ] = None,
    response: Annotated[
        int | None,
        typer.Option("--response-len", help="Tokens of a response. [default: the recipe's, 448]", show_default=False),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Rows a step. [default: the recipe's, 64]", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; may be given often."),
    ] = None,
    tries: Annotated[
        int, typer.Option("--tries", min=0, help="Other meshes and micro-batches to compile where it does not fit.")
    ] = 4,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else.")
    ] = False,
) -> None:
    """Compile a bake for a TPU that is not there: does it fit, and how close to its bound is it.

    The step with the teacher's pass, the step with the teacher's targets known, and the sampler's loop are compiled
    by the TPU's own compiler. Shown are the memory of a chip, the matrix products' FLOPs, the compiler's estimate of
    cycles (loops multiplied out; without the collectives that the program waits for), which share of them the FLOPs
    alone would take, and the collectives. Where it does not fit, it says by how much and looks for what does.
    No weights are read; a model's config.json is enough. Needs `pip install 'jaxbake[plan]'`. Exit code 3: nothing
    that fits was found.

    Examples:

      jaxbake plan configs/llama31_8b_document.yaml --topology v5e:4x4

      jaxbake plan --model Qwen/Qwen3-32B --topology v6e:4x4 --mesh fsdp=8,tp=2 --batch 32

      jaxbake plan --model ./config.json --topology v5e:4x4 --slices 2 --mesh replica=2,fsdp=16 --json
    """
    from jaxbake.errors import JaxbakeError
    from jaxbake.plan import make_plan, request_for
    from jaxbake.recipe import load_recipe

    if recipe is None and overrides:
        raise JaxbakeError("plan: --set changes a recipe; there is none")
    request = request_for(
        topology, recipe=recipe and load_recipe(recipe, overrides or []), model=model, mesh=mesh, slices=slices,
        rows=batch, question=question, response=response, prompt=prompt,
    )  # fmt: skip
    result = make_plan(request, tries=tries, say=show.note)
    if as_json:
        show.print_json(result.to_dict())
    else:
        show.console().print(result)
    if result.best is None:
        raise typer.Exit(3)
