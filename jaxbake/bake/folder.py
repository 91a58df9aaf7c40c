"""A bake's output folder: which bake it holds, and its metrics as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxbake.errors import JaxbakeError
from jaxbake.files import read_json, write_whole

IDENTITY, METRICS, STIMULI = "bake.json", "metrics.jsonl", "stimuli.jsonl"
TRAJECTORIES, CHECKPOINTS, DELTA, TENSORBOARD = "trajectories", "checkpoints", "delta", "tensorboard"


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes the folder this bake's own, or checks that it already is (`bake.json` holds the identity).

    Raises JaxbakeError where it holds another bake, naming what differs, or cannot be written.
    """
    path = folder / IDENTITY
    if not path.exists():
        if any((folder / name).exists() for name in (TRAJECTORIES, CHECKPOINTS, DELTA)):
            raise JaxbakeError(f"{folder}: holds files of a bake but no {IDENTITY}; choose another output folder")
        write_whole(path, json.dumps(identity, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        return
    if different := _differences(read_json(path), json.loads(json.dumps(identity))):
        raise JaxbakeError(
            f"{folder}: the output folder holds another bake (not the same: {', '.join(different[:4])}); "
            "choose another output folder, or delete this one to start anew"
        )


def _differences(a: dict, b: dict, path: str = "") -> list[str]:
    """Dotted names of the entries in which two nested dictionaries differ."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{path}{key}.")
        elif left != right:
            found.append(f"{path}{key}")
    return found


class MetricsLog:
    """`metrics.jsonl`, a line per step written as it comes; without a path, kept in memory only.

    step: the step a resumed bake goes on from, None for one that starts. Lines after it (the killed run wrote them
    after its last checkpoint) are dropped, so that no step stands there twice.
    """

    def __init__(self, path: Path | None, step: int | None):
        self.path, self.rows = path, []
        if path is not None:
            if step is not None and path.exists():
                self.rows = [row for row in read_metrics(path) if row["step"] <= step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Appends one line. Raises JaxbakeError where it cannot be written."""
        self.rows.append(row)
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise JaxbakeError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one cut by a kill. Raises JaxbakeError for other damage."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise JaxbakeError(f"{path}: cannot be read: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise JaxbakeError(f"{path} line {number}: is damaged, not JSON ({error})") from error
    return rows
