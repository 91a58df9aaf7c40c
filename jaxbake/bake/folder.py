"""A bake's output folder: which bake it holds, where it was run, and its metrics as JSON lines."""

from __future__ import annotations

import json
from typing import Any

from jaxbake import hosts
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, is_remote, read_json, write_whole

IDENTITY, METRICS, STIMULI, RUNS = "bake.json", "metrics.jsonl", "stimuli.jsonl", "runs.json"
TRAJECTORIES, CHECKPOINTS, DELTA, TENSORBOARD = "trajectories", "checkpoints", "delta", "tensorboard"
TEACHER = "teacher"


def claim(folder: AnyPath, identity: dict[str, Any]) -> None:
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


def claim_shared(folder: AnyPath, identity: dict[str, Any]) -> None:
    """`claim` for all processes, by the first.

    Raises JaxbakeError in all of them where one does not see the folder that the first made.
    """
    hosts.first(lambda: claim(folder, identity))
    blind = [i for i, sees in enumerate(hosts.gather((folder / IDENTITY).exists())) if not sees]
    if blind:
        raise JaxbakeError(
            f"{folder}: process {', '.join(map(str, blind))} does not see it; several processes need an output folder "
            "that all of them share: a network file system, or gs://"
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


class Runs:
    """`runs.json`: in which environments the bake of a folder was run, for the card; None keeps nothing.

    A run that goes on from an earlier one's work does so "bitwise" where the environment (`hosts.environment`) is the
    same as that of all runs before it, otherwise "numerically": equal to rounding, not to the bit.
    """

    def __init__(self, folder: AnyPath | None, environment: dict[str, Any]):
        self._path = folder and folder / RUNS
        self.environment = environment
        rows = hosts.first(lambda: read_json(self._path)["runs"] if self._path and self._path.exists() else [])
        self.rows = [*rows, {"resume": None, "responses": 0, "step": 0, "environment": environment}]

    def note(self, *, responses: int, step: int = 0) -> None:
        """Tells what there was when this run began: so many responses, and training after that step."""
        row, before = self.rows[-1], [row["environment"] for row in self.rows[:-1]]
        if responses or step:
            changed = {k for env in before for k in _differences(env, self.environment)}
            row["resume"] = "numerical" if changed else "bitwise"
            row["changed"] = sorted(changed)
        row["responses"], row["step"] = responses, step
        if self._path and hosts.is_first():
            write_whole(self._path, json.dumps({"runs": self.rows}, indent=2) + "\n")

    @property
    def resumes(self) -> list[dict[str, Any]]:
        """The runs that went on from an earlier one's work."""
        return [row for row in self.rows if row["resume"]]


class MetricsLog:
    """`metrics.jsonl`, a line per step written as it comes; without a path, kept in memory only.

    step: the step a resumed bake goes on from, None for one that starts. Lines after it (the killed run wrote them
    after its last checkpoint) are dropped, so that no step stands there twice. Process 0 alone writes. Nothing can be
    appended in an object store: there the file is written anew by `flush`, which comes before every checkpoint.
    """

    def __init__(self, path: AnyPath | None, step: int | None):
        self.path, self.rows = path, []
        if path is not None:
            if step is not None and path.exists():
                self.rows = [row for row in read_metrics(path) if row["step"] <= step]
            self._rewrite()

    def _rewrite(self) -> None:
        if hosts.is_first():
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def flush(self) -> None:
        """Puts all lines where a reader can see them."""
        if self.path is not None and is_remote(self.path):
            self._rewrite()

    def add(self, row: dict[str, Any]) -> None:
        """Appends one line. Raises JaxbakeError where it cannot be written."""
        self.rows.append(row)
        if self.path is not None and hosts.is_first() and not is_remote(self.path):
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise JaxbakeError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
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
