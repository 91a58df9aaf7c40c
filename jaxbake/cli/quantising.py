"""`quantize-report`: what holding a model as small integers would cost and save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxbake.cli import app, show
from jaxbake.errors import JaxbakeError


@app.command("quantize-report")
def quantize_report(
    model: Annotated[str, typer.Argument(help="crumb, a folder in Hugging Face format, or a hub name.")],
    quantize: Annotated[
        list[str] | None, typer.Option("--quantize", "-q", help="int8 or int4; may be given twice. [default: both]")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="A file with a user turn a line. [default: shipped prompts]")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16; as stored by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")] = False,
) -> None:
    """Measure how far a model held as int8 or int4 is from the original, and how much memory its weights take.

    The linear layers become integers with scales; norms, embeddings and the head stay as they are. The original and the
    quantised model are computed side by side, one layer in memory at a time. KL is in nats a token.

    Examples:

      jaxbake quantize-report crumb

      jaxbake quantize-report Qwen/Qwen3-0.6B --quantize int4 --texts questions.txt
    """
    from jaxbake.bake.quantisation import quantisation_report
    from jaxbake.models.quantised import KINDS

    lines = None
    if texts is not None:
        try:
            lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise JaxbakeError(f"{texts}: cannot be read as text ({error})") from None
    found = [quantisation_report(model, kind, lines, dtype=dtype) for kind in quantize or KINDS]
    if as_json:
        show.print_json([report.to_dict() for report in found])
        return
    from rich.table import Table

    table = Table("held as", "KL to the original", "same top token", "weights", "of the original", box=None)
    for report in found:
        table.add_row(
            report.kind, f"{report.kl:.4g}", f"{100 * report.agreement:.1f} %", f"{report.bytes / 1e6:,.1f} MB",
            f"{100 * report.bytes / report.original_bytes:.0f} %",
        )  # fmt: skip
    show.console().print(table)
    show.note(f"over {found[0].tokens} tokens")
