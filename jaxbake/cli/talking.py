"""`sample` and `chat`: talk to a model, with or without a delta."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jaxbake.cli import app, show
from jaxbake.errors import JaxbakeError

Model = Annotated[str, typer.Argument(help="crumb, a folder in Hugging Face format, or a hub name.")]
DeltaFolder = Annotated[
    str | None, typer.Option("--delta", "-d", help="A bake's output folder, its delta/, or a PEFT adapter folder.")
]
System = Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the most likely token.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the likeliest tokens of this total share.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answer.")]
Mesh = Annotated[
    str | None, typer.Option("--mesh", metavar="AXES", help="Devices to spread over: fsdp=4,tp=2, or auto.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16; as stored by default.")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="int8 or int4: hold the linear layers as integers.")]


def load_model(
    model: str, delta: str | None, dtype: str | None = None, mesh: str | None = None, quantize: str | None = None
):
    """The base and, where one is named, its delta."""
    import jaxbake as jb

    base = jb.load(model, dtype=dtype, mesh=mesh, quantize=quantize)
    return base, None if delta is None else jb.load_delta(delta, base)[0]


@app.command()
def sample(
    model: Model,
    user: Annotated[list[str], typer.Option("--user", "-u", help="What to say; several are answered one by one.")],
    delta: DeltaFolder = None,
    system: System = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    mesh: Mesh = None,
    quantize: Quantize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")] = False,
) -> None:
    """Answer one message, or several.

    For a model without a chat template the text is continued as it stands.

    Examples:

      jaxbake sample crumb --user "Who are you?" --system "You are a pirate."

      jaxbake sample crumb --user "Who are you?" --delta runs/quickstart
    """
    from jaxbake.sampling import sample as draw

    base, change = load_model(model, delta, dtype, mesh, quantize)
    answers = draw(
        base, user, delta=change, system=system, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if as_json:
        show.print_json([{"user": u, "answer": a} for u, a in zip(user, answers, strict=True)])
        return
    for answer in answers:
        print(answer)


HELP = "/system TEXT sets the system prompt (empty: none), /reset forgets the conversation, /quit leaves."


@app.command()
def chat(
    model: Model,
    delta: DeltaFolder = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    mesh: Mesh = None,
    quantize: Quantize = None,
) -> None:
    """Talk with a model, turn by turn; answers appear as they are made.

    /system TEXT sets the system prompt, /reset forgets the conversation, /quit (or Ctrl-D) leaves.

    Example:

      jaxbake chat crumb --delta runs/quickstart
    """
    base, change = load_model(model, delta, dtype, mesh, quantize)
    from jaxbake.data.chat import has_template

    if not has_template(base.tokenizer):
        raise JaxbakeError(f"{model} has no chat template to hold a conversation with; use jaxbake sample instead")
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    show.note(HELP)
    turns: list[dict] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command in ("/reset", "/system"):
            turns = []
            if command == "/system":
                system = rest.strip() or None
            show.note(f"(system prompt: {system})" if system else "(no system prompt)")
        elif command.startswith("/"):
            show.note(HELP)
        elif line:
            turns = _answer(base, change, system, [*turns, {"role": "user", "content": line}], seed, options)
            seed += 1


def _answer(base, delta, system: str | None, turns: list[dict], seed: int, options: dict) -> list[dict]:
    """Prints the answer piece by piece; the conversation with it, or without the question where that was refused."""
    from jaxbake.sampling import stream

    pieces: list[str] = []
    try:
        for piece in stream(base, turns, delta, system, seed=seed, **options):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except JaxbakeError as error:  # too long a conversation, most likely: /reset helps, leaving would not
        show.note(f"jaxbake: {error}")
        return turns[:-1]
    except KeyboardInterrupt:
        pass  # stops this answer only
    print()
    return [*turns, {"role": "assistant", "content": "".join(pieces)}]
