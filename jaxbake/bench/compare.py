"""Ours and theirs, run in turn: every command once a round, so that whatever slows the machine slows both."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbake.cache import HUGE_PAGES
from jaxbake.errors import JaxbakeError

OURS = (sys.executable, "-c", "from jaxbake.cli import main; main()", "bench")
RATES = ("response_tokens_per_s", "student_response_tokens_per_s", "tokens_per_s")
SECONDS = ("median_step_s", "median_call_s", "median_s")
MEMORIES = ("peak_mb", "peak_rss_mb")
PEERS = ("torch_bake.py", "trl_bake.py", "hf_generate.py")


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure of ours over one of theirs (or by itself), and what it should reach.

    ours, theirs: names of commands; theirs None takes our figure alone. figure: "speed", "memory" (theirs over ours,
    so that more is better in every line), or a field of our JSON. most: the value is to stay below `wanted` instead.
    """

    name: str
    ours: str
    theirs: str | None
    figure: str
    wanted: float | None
    most: bool = False


def against(ours: Sequence[str], theirs: str) -> tuple[dict[str, list[str]], list[Line]]:
    """Commands and lines for one bench of ours ("step --size M") beside one rival's command line."""
    commands = {"ours": [*OURS, *ours, "--json"], "theirs": shlex.split(theirs)}
    return commands, [Line("speed", "ours", "theirs", "speed", None), Line("memory", "ours", "theirs", "memory", None)]


def table(
    peers: Path, sizes: Sequence[str], *, python: str, threads: int, steps: int, trl: bool, long_prompt: int = 4096
) -> tuple[dict[str, list[str]], list[Line]]:
    """Commands and lines of the whole comparison with a folder of peer scripts (`torch_bake.py`, ...).

    Raises JaxbakeError where a script is missing.
    """
    missing = [name for name in PEERS if not (peers / name).is_file() and (trl or name != "trl_bake.py")]
    if missing:
        raise JaxbakeError(f"{peers}: has no {', '.join(missing)}; a folder of peers holds {', '.join(PEERS)}")
    commands: dict[str, list[str]] = {}
    lines: list[Line] = []

    def ours(name: str, *args: str) -> str:
        commands[name] = [*OURS, *args, "--steps", str(steps), "--json"]
        return name

    def theirs(name: str, script: str, *args: str) -> str:
        count = ["--threads", str(threads), "--steps", str(steps), "--warmup", "1"]
        commands[name] = [python, str(peers / script), *args, *count]
        return name

    for size in sizes:
        cached, online = ours(f"{size} cached", "step", "--size", size), None
        plain = theirs(f"{size} torch eager", "torch_bake.py", "--size", size)
        best = theirs(f"{size} torch best", "torch_bake.py", "--size", size, "--compile", "--teacher-cache")
        online = ours(f"{size} online", "step", "--size", size, "--online")
        lines.append(Line(f"{size}: cached targets / eager PyTorch + PEFT", cached, plain, "speed", 2.0))
        lines.append(Line(f"{size}: cached targets / best options", cached, best, "speed", 2.0 if size == "S" else 1.3))
        if trl:
            rival = theirs(f"{size} TRL", "trl_bake.py", "--size", size)
            lines.append(Line(f"{size}: cached targets / TRL", cached, rival, "speed", 3.0 if size == "L" else 2.0))
        lines.append(Line(f"{size}: online / best options", online, best, "speed", 1.0))
        if size != "S":
            lines.append(Line(f"{size}: memory of eager / ours", cached, plain, "memory", 2.0))
        lines.append(Line(f"{size}: share of measured matmul peak", cached, None, "share_of_peak", 0.75))
    if "M" in sizes:
        long = ("--size", "M", "--prompt-len", str(long_prompt))
        cached = ours(f"M {long_prompt} cached", "step", *long)
        short = ours("M 128 cached", "step", "--size", "M", "--prompt-len", "128")
        plain = theirs(f"M {long_prompt} torch eager", "torch_bake.py", *long)
        lines.append(Line(f"M, prompt of {long_prompt}: cached targets / eager", cached, plain, "speed", 6.0))
        lines.append(Line(f"M, prompt of 128 / of {long_prompt}, both cached", short, cached, "speed", 1.1, most=True))
        rows = ("--size", "M", "--batch", "16", "--response-len", "64")
        sample = ours("M sample", "sample", *rows)
        naive = theirs("M generate", "hf_generate.py", *rows)
        shared = theirs("M generate, prompt shared", "hf_generate.py", *rows, "--way", "shared")
        lines.append(Line("M: sampling / Hugging Face generate", sample, naive, "speed", 3.0))
        lines.append(Line("M: sampling / generate with the prompt's cache shared", sample, shared, "speed", None))
        mixed = ours("M mixed lengths", "step", "--size", "M", "--mixed", "--batch", "16")
        lines.append(Line("M, 16 rows of mixed lengths: useful share of tokens", mixed, None, "useful_fraction", 0.9))
        many = ours("M 32 deltas", "many", "--size", "M", "--members", "32", "--batch", "2")
        lines.append(Line("M: 32 deltas in one step / one delta, as many tokens", many, None, "ratio", 1.3, most=True))
    return commands, lines


def run(commands: dict[str, list[str]], rounds: int, threads: int, note: Callable[[str], None]) -> dict[str, list]:
    """Every command once a round; the JSON each printed, by name. Raises JaxbakeError for one that fails."""
    results: dict[str, list] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            note(f"round {turn + 1} of {rounds}: {name}")
            results[name].append(_json(name, command, threads))
    return results


def rows(results: dict[str, list], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each line with its median figures, their ratio, and whether it reaches what is wanted."""
    out = []
    for line in lines:
        ours = _median(results[line.ours], line.figure)
        theirs = None if line.theirs is None else _median(results[line.theirs], line.figure)
        value = ours if theirs is None else theirs / ours if line.figure == "memory" else ours / theirs
        met = line.wanted is None or (value <= line.wanted if line.most else value >= line.wanted)
        out.append(
            {"line": line.name, "ours": ours, "theirs": theirs, "ratio": value, "wanted": line.wanted, "met": met}
            | {"most": line.most}
        )
    return out


def page(found: Sequence[dict[str, Any]], commands: dict[str, list[str]], results: dict[str, list]) -> str:
    """The lines as a table of Markdown, and below it every command with its own figures."""
    out = ["| | ours | theirs | ratio | wanted | |", "|---|---|---|---|---|---|"]
    for row in found:
        out.append("| " + " | ".join((row["line"], *cells(row))) + " |")
    out += ["", "| | command | tokens a second | seconds | MB |", "|---|---|---|---|---|"]
    for name, command in commands.items():
        own = command[: len(OURS)] == list(OURS)
        text = shlex.join(["jaxbake", "bench", *command[len(OURS) :]] if own else [Path(command[1]).name, *command[2:]])
        figures = [_first(results[name], fields) for fields in (RATES, SECONDS, MEMORIES)]
        shown = ["" if value is None else f"{value:,.4g}" for value in figures]
        out.append("| " + " | ".join((name, f"`{text}`", *shown)) + " |")
    return "\n".join(out) + "\n"


def cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """A line's figures as text: ours, theirs, ratio, what is wanted, and whether it is met."""
    theirs = "" if row["theirs"] is None else f"{row['theirs']:,.4g}"
    wanted = "" if row["wanted"] is None else f"{'<=' if row['most'] else '>='} {row['wanted']:g}"
    met = "" if row["wanted"] is None else "met" if row["met"] else "NOT MET"
    return f"{row['ours']:,.4g}", theirs, f"{row['ratio']:.2f}", wanted, met


def _first(found: Sequence[dict], names: Sequence[str]) -> float | None:
    """The median of the first of these fields that all results have."""
    for name in names:
        values = [one.get(name) for one in found]
        if None not in values:
            return statistics.median(values)
    return None


def _median(found: Sequence[dict], figure: str) -> float:
    names = {"speed": RATES, "memory": MEMORIES}.get(figure, (figure,))
    if (value := _first(found, names)) is None:
        raise JaxbakeError(f"a result has no field {' or '.join(names)}; a rival must print one JSON object with it")
    return value


@contextmanager
def _confined(threads: int) -> Iterator[None]:
    """Processes begun in this block keep to the first `threads` processors, where the system can say so."""
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _json(name: str, command: Sequence[str], threads: int) -> dict:
    """Runs a command on the first `threads` processors; the last JSON object it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if environment.pop(HUGE_PAGES, None):  # each side begins as it would from a plain shell
        environment.pop("GLIBC_TUNABLES", None)
    if threads > 1:
        environment.setdefault("OMP_WAIT_POLICY", "active")  # PyTorch's best

    try:
        with _confined(threads):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise JaxbakeError(f"{name}: {command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise JaxbakeError(f"{name}: ended with code {done.returncode} ({last}); the command: {shlex.join(command)}")
    end, decoder = done.stdout.rfind("}") + 1, json.JSONDecoder()
    for start in (i for i, c in enumerate(done.stdout[:end]) if c == "{"):
        try:
            value, length = decoder.raw_decode(done.stdout[start:])
        except json.JSONDecodeError:
            continue
        if start + length == end:
            return value
    raise JaxbakeError(f"{name}: printed no JSON object; the command: {shlex.join(command)}")
