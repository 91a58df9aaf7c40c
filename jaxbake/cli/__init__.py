"""The command line: thin commands around the library; heavy imports happen inside them."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from jaxbake.cache import HUGE_PAGES, keep_compiled
from jaxbake.errors import JaxbakeError, PeerLost, Preempted

PREEMPTED, PEER_LOST = 75, 69
"""Exit codes beside 0, 2 and 130; `jaxbake.hosts` has the table."""

_RESUMABLE = ("quickstart", "bake", "bake-many")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class _Commands(TyperGroup):
    """Turns what a person can mend into one line on stderr and exit code 2; all else keeps its stack trace."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # both are RuntimeErrors, and no business of what follows
            raise
        except JaxbakeError as error:
            _leave(f"jaxbake: {error}", 2)
        except KeyboardInterrupt:
            again = "; run the same command to continue" if ctx.invoked_subcommand in _RESUMABLE else ""
            _leave(f"\njaxbake: interrupted{again}", 130)
        except Preempted as error:
            _leave(f"jaxbake: preempted; {error}; run the same command to continue", PREEMPTED)
        except OSError as error:
            if error.errno not in _DISK:
                raise
            _leave(f"jaxbake: {error.filename or 'file'}: {error.strerror}", 2)
        except (PeerLost, RuntimeError) as error:  # jax's own errors are RuntimeErrors
            from jaxbake import hosts

            if not hosts.lost(error):
                raise
            said = next(iter(str(error).strip().splitlines()), "")[:200]
            print(
                f"jaxbake: another process of this bake is gone ({said}); start all again", file=sys.stderr, flush=True
            )
            os._exit(PEER_LOST)  # to say goodbye to those that are gone would take minutes, and end in an abort


def _leave(message: str, code: int):
    print(message, file=sys.stderr)
    raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from jaxbake import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            envvar="JAXBAKE_CACHE",
            help="Where compiled programs are kept: a folder, a bucket, or off. [default: the user's cache folder]",
        ),
    ] = None,
) -> None:
    """Bake a prompt into a model's weights, as a low-rank delta.

    Start with **jaxbake quickstart**: it bakes a prompt into the small model that ships with jaxbake, measures
    what came of it, and says what to try next. It needs no network and no accelerator.
    """
    keep_compiled(cache)


def _with_huge_pages() -> None:
    """Starts this command again, once, with memory in huge pages where Linux gives them to those who ask.

    Every step takes its working memory anew, which on a CPU costs more in small pages (compare `jaxbake bench step`
    with `GLIBC_TUNABLES= jaxbake bench step`). glibc reads the setting only when a process begins. Whoever sets
    GLIBC_TUNABLES, even to nothing, is left alone.
    """
    heavy = {"quickstart", "bake", "bake-many", "bench", "eval", "sample", "chat"} & set(sys.argv[1:4])
    if not heavy or sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        asked = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        glibc = os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (OSError, ValueError):
        return
    if asked and glibc:
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", HUGE_PAGES: "on"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main() -> None:
    """What the `jaxbake` command runs."""
    _with_huge_pages()
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("absl").setLevel(logging.ERROR)
    app()


from jaxbake.cli import (  # noqa: E402, F401  (each adds its commands to `app`)
    baking,
    benching,
    deltas,
    planning,
    quantising,
    talking,
)
