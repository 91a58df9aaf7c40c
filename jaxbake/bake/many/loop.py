"""Many bakes at once: several prompts into deltas of their own, trained in one step over one base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.examples import make_examples
from jaxbake.bake.folder import Runs, claim_shared
from jaxbake.bake.job import Job, Prompts, make_job
from jaxbake.bake.lock import owned
from jaxbake.bake.many.seat import Member, check_alike
from jaxbake.bake.many.train import train_many
from jaxbake.bake.other import Other
from jaxbake.bake.others import Contexts
from jaxbake.bake.progress import Progress, silent
from jaxbake.bake.result import BakeResult, is_finished, make_result, read_result
from jaxbake.bake.train import Trained
from jaxbake.bakery.card import sha256
from jaxbake.config import BakeConfig, StimuliConfig
from jaxbake.errors import JaxbakeError, TrainingDiverged
from jaxbake.files import AnyPath, absolute, is_remote, read_json, write_whole
from jaxbake.models.base import Base, on_mesh

STATES, GROUP = ".many", "group.json"
"""Where the states of unfinished groups lie, in the folder that holds the members' own; and whose they are."""


@dataclass(frozen=True)
class BakeSpec:
    """One of several bakes: the arguments that `jaxbake.bake` takes for it, and a name, which is its folder's too."""

    name: str
    prompt: str | None = None
    stimuli: Sequence[str] | StimuliConfig | None = None
    config: BakeConfig = BakeConfig()
    pins: Sequence[str] | None = None
    contexts: Contexts | None = None
    recipe: dict[str, Any] | None = None
    root: str | Path = "."
    prompts: Prompts | None = None


def bake_many(
    base: Base,
    bakes: Sequence[BakeSpec],
    output: str | AnyPath | None = None,
    *,
    teacher: Base | str | None = None,
    progress: Progress | None = None,
) -> list[BakeResult]:
    """Bakes several prompts at once, each into a delta of its own: one pass over the base serves them all.

    Prompts, stimuli, ranks, targets, learning rates, numbers of steps, batch sizes and seeds may differ; the loss, and
    what is kept of the teacher, must be the same. Each result equals that of `jaxbake.bake` with the same arguments up
    to rounding: its own batches, held-out examples, schedule, clipping and early stop. A bake that diverges does not
    touch the others. On a mesh each member's rows are spread as those of a bake alone, a multiple of the devices along
    them; several processes (see `jaxbake.hosts`) all make the same call, with a base on a mesh over all their devices.

    Args:
      base: what `jaxbake.load` gives.
      bakes: at least one; their names must differ, their losses and meshes not.
      output: a folder to hold one for each bake, by name, as `jaxbake.bake` writes it. The same call with the same
        folder continues what was interrupted, bitwise; bakes that are finished are returned as they are, whoever made
        them. None writes nothing.
      teacher: another model that teaches all of them, as for `jaxbake.bake`; by default `config.teacher.model`. What it
        says, and what the base says behind several prompts of one bake, must have room in that bake's `config.train`.
      progress: called as work advances; "sample" counts bakes.

    Returns the results in the order of `bakes`.

    Raises:
      JaxbakeError: as `jaxbake.bake`, naming the bake.
      TrainingDiverged: once all others are finished, where a loss was not finite; `results` holds the others (None for
        those that diverged), `deltas` the last good delta of each that diverged, by name (where it did so before an
        interruption: its state is in its folder's checkpoints).
    """
    progress = progress or silent
    _check_names(bakes)
    base = on_mesh(base, bakes[0].config.mesh, min(bake.config.train.batch_size for bake in bakes))
    output = None if output is None else absolute(output)
    teacher = bakes[0].config.teacher.model if teacher is None else teacher
    other = None if teacher is None else Other(teacher, base)
    jobs = [_job(base, bake, output, other) for bake in bakes]
    results: list[BakeResult | None] = [None] * len(bakes)
    for i, job in enumerate(jobs):
        if job.folder and hosts.first(partial(is_finished, job)):
            results[i] = read_result(job, base)
    unfinished = [i for i, result in enumerate(results) if result is None]
    if not unfinished:
        return results
    failed: dict[str, TrainingDiverged] = {}
    with ExitStack() as locks:
        for i in unfinished:
            if folder := jobs[i].folder:
                locks.enter_context(owned(folder))
                claim_shared(folder, jobs[i].identity)
        keys = [sha256(json.dumps([bake.name, job.identity])) for bake, job in zip(bakes, jobs, strict=True)]
        group, name = hosts.first(lambda: _group(keys, unfinished, output and output / STATES))
        states = output and output / STATES / name
        members = []
        for done, i in enumerate(group):
            shown = progress if len(group) == 1 else silent
            members.append(_member(base, bakes[i], jobs[i], results[i] is not None, shown))
            progress("sample", done + 1, len(group), {})

        def ended(m: int, what: Trained | TrainingDiverged) -> None:
            i = group[m]
            bake, member = bakes[i], members[m]
            if isinstance(what, TrainingDiverged):
                failed[bake.name] = what
            elif results[i] is None:
                results[i] = make_result(base, jobs[i], what, member.held_out, member.runs, bake.name, bake.recipe)

        told = [m for m, i in enumerate(group) if results[i] is not None]
        train_many(base, members, states and states / layout.CHECKPOINTS, progress, ended, told)
    if failed:
        error = TrainingDiverged("; ".join(f"{name}: {what}" for name, what in failed.items()))
        error.results, error.deltas = results, {name: getattr(what, "delta", None) for name, what in failed.items()}
        raise error
    if states is not None:  # all its deltas are written, and nobody reads there any more
        hosts.gather(True)
        hosts.first(lambda: _forget(states))
    return results


def _forget(states: AnyPath) -> None:
    from etils import epath

    epath.Path(states).rmtree()
    if not is_remote(states) and not any(states.parent.iterdir()):
        states.parent.rmdir()


def _group(keys: list[str], unfinished: list[int], root: AnyPath | None) -> tuple[list[int], str]:
    """Which bakes to train together, and the name of the folder where their states lie.

    A group that was interrupted goes on with its own members, finished ones among them, for its states are theirs;
    otherwise those that are not finished make a new one.
    """
    if root is None:
        return unfinished, ""
    for file in sorted(root.glob(f"*/{GROUP}")):
        members = read_json(file).get("members", [])
        if set(members) <= set(keys) and {keys[i] for i in unfinished} <= set(members):
            return [keys.index(key) for key in members], file.parent.name
    members = [keys[i] for i in unfinished]
    name = sha256(json.dumps(members))[:16]
    write_whole(root / name / GROUP, json.dumps({"members": members}, indent=2) + "\n")
    return unfinished, name


def _check_names(bakes: Sequence[BakeSpec]) -> None:
    if not bakes:
        raise JaxbakeError("bake_many: there is nothing to bake; give at least one BakeSpec")
    names = [bake.name for bake in bakes]
    for name in names:
        if not name.strip() or {"/", "\\"} & set(name) or name.startswith("."):
            raise JaxbakeError(f"bake_many: name '{name}' is not fit for a folder")
        if names.count(name) > 1:
            raise JaxbakeError(f"bake_many: '{name}' is there {names.count(name)} times; each needs a name of its own")
    check_alike(bakes)


def _job(base: Base, bake: BakeSpec, output: AnyPath | None, other: Other | None) -> Job:
    try:
        return make_job(
            base, bake.prompt, bake.prompts, bake.stimuli, bake.config, other=other, pins=bake.pins,
            contexts=bake.contexts, folder=output and output / bake.name, root=Path(bake.root),
        )  # fmt: skip
    except JaxbakeError as error:
        raise JaxbakeError(f"{bake.name}: {error}") from error


def _member(base: Base, bake: BakeSpec, job: Job, finished: bool, progress: Progress) -> Member:
    """The bake's examples, from responses that are sampled now or already there; finished, its folder is left alone."""
    folder = None if finished else job.folder
    runs = Runs(folder, hosts.environment(base.mesh))
    try:
        examples = make_examples(base, job, runs, progress)
    except JaxbakeError as error:
        raise JaxbakeError(f"{bake.name}: {error}") from error
    return Member(bake.name, bake.config, *examples, folder, runs, job.other)
