"""A recipe from start to end: load, sample, bake, export, evaluate; and measuring again what was baked."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from jaxbake import hosts
from jaxbake.bake.folder import DELTA, TRAJECTORIES
from jaxbake.bake.job import Prompts
from jaxbake.bake.lock import owned
from jaxbake.bake.loop import bake
from jaxbake.bake.many.loop import BakeSpec, bake_many
from jaxbake.bake.others import is_crumb
from jaxbake.bake.progress import Progress, silent
from jaxbake.bake.result import BakeResult
from jaxbake.bakery.card import Card, sha256
from jaxbake.bakery.store import load_delta
from jaxbake.config import Recipe
from jaxbake.data.chat import Example, example_from_response
from jaxbake.data.stimuli import load_pins
from jaxbake.data.trajectories import TrajectoryStore
from jaxbake.deltas.lora import Delta
from jaxbake.deltas.peft import save_peft
from jaxbake.errors import JaxbakeError, Preempted, TrainingDiverged
from jaxbake.evaluate import report
from jaxbake.evaluate.items import load_items
from jaxbake.evaluate.measure import Evaluation, measure
from jaxbake.evaluate.plot import plot
from jaxbake.evaluate.retention import Material, smallworld_material
from jaxbake.evaluate.scores import Scores, score_abilities, score_items
from jaxbake.files import AnyPath, as_path, is_remote, local_copy, read_json, write_whole
from jaxbake.models.base import Base, load
from jaxbake.recipe import dump_recipe, load_recipe, read_prompt, read_prompts
from jaxbake.smallworld import CRUMB

QUICKSTART = Path(str(resources.files("jaxbake.data") / "defaults" / "quickstart.yaml"))
"""The recipe of `jaxbake quickstart`; configs/quickstart.yaml is the same."""

RECIPE, EVALUATION, SUMMARY, PLOT, PEFT = "recipe.yaml", "evaluation.json", "summary.md", "plot.png", "peft"
_KEPT = 128  # questions of each kind on what a bake of crumb should leave alone: whole batches, so few compilations
_UNRELATED = 32  # user turns on which base and baked model are compared, for models other than crumb


@dataclass(frozen=True)
class Outcome:
    """What a recipe came to. `reused`: the folder already held it, finished; `seconds`: what making it took; `notes`:
    what is to be said beside the measurements."""

    recipe: Recipe
    output: AnyPath
    evaluation: Evaluation
    seconds: float | None = None
    reused: bool = False
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, AnyPath]:
        """What stands where."""
        names = {
            "delta": DELTA, "card": f"{DELTA}/card.json", "PEFT adapter": PEFT, "plot": PLOT, "summary": SUMMARY,
            "answers": TRAJECTORIES,
        }  # fmt: skip
        return {what: self.output / name for what, name in names.items()}

    @property
    def next_command(self) -> str:
        """What to try now."""
        held = f" --quantize {self.recipe.quantize}" if self.recipe.quantize else ""
        return f"jaxbake chat {shlex.quote(self.recipe.model)} --delta {shlex.quote(str(self.output))}{held}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.recipe.name,
            "model": self.recipe.model,
            "output": str(self.output),
            "seconds": self.seconds,
            **self.evaluation.to_dict(),
            "notes": list(self.notes),
            "files": {what: str(path) for what, path in self.files.items()},
        }

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table

        files = Table.grid(padding=(0, 2))
        for what, path in self.files.items():
            files.add_row(what, str(path))
        took = "" if self.seconds is None else f" in {self.seconds:.0f} s"
        return Group(
            report.render(self.evaluation),
            *self.notes,
            f"\n[bold]{self.recipe.name}[/bold] baked into {self.recipe.model}{took}:",
            files,
            f"\nNext: [bold]{self.next_command}[/bold]",
        )


def run_recipe(
    recipe: Recipe, root: str | Path = ".", output: str | AnyPath | None = None, progress: Progress | None = None
) -> Outcome:
    """Does all that a recipe says, and writes the output folder.

    Args:
      recipe: what `load_recipe` gives.
      root: the folder that files in the recipe are relative to.
      output: the folder to write, local or gs://; by default the recipe's output / name. The same call continues what
        was interrupted, and returns what is finished. Of several processes all make it, and process 0 writes.
      progress: called as work advances.

    Raises JaxbakeError as `load`, `bake` and `measure` do, and Preempted after a SIGTERM (see `jaxbake.hosts`).
    """
    started, progress = time.monotonic(), progress or silent
    entry = _entry(recipe, Path(root), as_path(recipe.output) / recipe.name if output is None else as_path(output))
    if entry.finished:
        return entry.finished
    base = _base(recipe, recipe.bake.train.batch_size)
    result = bake(
        base, entry.kept.prompt, recipe.stimuli, recipe.bake, entry.output, progress=progress, name=recipe.name,
        prompts=_prompts_of(recipe, root), recipe=dataclasses.asdict(entry.kept), root=root,
    )  # fmt: skip
    return _completed(entry, base, result, started, progress)


def run_recipes(
    recipes: Sequence[tuple[Recipe, str | Path]], output: str | AnyPath | None = None, progress: Progress | None = None
) -> list[Outcome]:
    """Does all that several recipes for one model say, their bakes trained together in one step (`bake_many`).

    Args:
      recipes: each with the folder that its files are relative to.
      output: the folder that holds one for each recipe, by name; by default the recipes' own `output`.
      progress: called as work advances; "sample" and "evaluate" count recipes.

    What is finished is returned as it is, whether it was baked so or by `run_recipe`. Raises JaxbakeError as
    `run_recipe` does, and where models, outputs, losses or meshes differ, or names do not; Preempted after a SIGTERM;
    TrainingDiverged at the end where a bake diverged, with all others written.
    """
    progress, started = progress or silent, time.monotonic()
    for field in ("model", "dtype", "quantize") + (("output",) if output is None else ()):
        values = dict.fromkeys(getattr(recipe, field) for recipe, _ in recipes)
        if len(values) > 1:
            raise JaxbakeError(f"{field}: must be the same for bakes of one step, found {', '.join(map(str, values))}")
    first = recipes[0][0]
    folder = as_path(first.output if output is None else output)
    entries = [_entry(recipe, Path(root), folder / recipe.name) for recipe, root in recipes]
    if all(entry.finished for entry in entries):
        return [entry.finished for entry in entries]
    base = _base(first, min(entry.recipe.bake.train.batch_size for entry in entries))
    specs = [
        BakeSpec(
            entry.recipe.name, entry.kept.prompt, entry.recipe.stimuli, entry.recipe.bake,
            recipe=dataclasses.asdict(entry.kept), root=entry.root, prompts=_prompts_of(entry.recipe, entry.root),
        )
        for entry in entries
    ]  # fmt: skip
    failed = None
    try:
        results = bake_many(base, specs, folder, progress=progress)
    except TrainingDiverged as error:
        results, failed = error.results, error
    outcomes = []
    for done, (entry, result) in enumerate(zip(entries, results, strict=True)):
        if result is not None:
            outcomes.append(entry.finished or _completed(entry, base, result, started, silent))
        progress("evaluate", done + 1, len(entries), {})
    if failed:
        raise failed
    return outcomes


def _base(recipe: Recipe, rows: int) -> Base:
    mesh = recipe.bake.mesh or ("auto" if jax.process_count() > 1 else None)  # processes share one model
    return load(recipe.model, dtype=recipe.dtype, mesh=mesh, rows=rows, quantize=recipe.quantize)


def _prompts_of(recipe: Recipe, root: str | Path) -> Prompts | None:
    return read_prompts(recipe, root) if recipe.prompts_file else None


@dataclass(frozen=True)
class _Entry:
    """A recipe, what it reads as in its output folder, and what that already holds of it (None: not finished)."""

    recipe: Recipe
    root: Path
    output: AnyPath
    kept: Recipe
    key: str
    items: list
    finished: Outcome | None


def _entry(recipe: Recipe, root: Path, output: AnyPath) -> _Entry:
    kept = inside(recipe, root, output)
    key = _key(kept, output)
    if hosts.first(lambda: _finished(kept, output, key) is not None):
        return _Entry(recipe, root, output, kept, key, [], _finished(kept, output, key))
    items = _items(recipe, root)  # before the work, so that a fault in it shows at once
    return _Entry(recipe, root, output, kept, key, items, None)


def _completed(entry: _Entry, base: Base, result: BakeResult, started: float, progress: Progress) -> Outcome:
    """All that follows a bake: export, measurements, plot, summary."""
    with owned(entry.output):
        save_peft(result.delta, base, entry.output / PEFT, card=result.card)
        evaluation = _measure(
            base, result.delta, entry.recipe, entry.root, entry.output, entry.items, _leaving(progress)
        )
        seconds = round(time.monotonic() - started, 1)
        outcome = Outcome(entry.kept, entry.output, evaluation, seconds, notes=_notes(entry.kept, result.card))
        hosts.first(lambda: _write(outcome, result, entry.key))
    return outcome


def _notes(recipe: Recipe, card: Card) -> tuple[str, ...]:
    """What the card tells that no measurement does."""
    metrics = card.metrics
    notes = [
        f"{report.percent(metrics['useful_fraction'])} of the computed tokens were of examples, the others padding."
    ]
    if card.teacher:
        k = recipe.bake.teacher.tokens_kept(other=True)
        notes.append(
            f"Imitated {card.teacher} behind the prompt: on the held-out responses the KL to it, over its {k} likeliest"
            f" tokens and all others together, went from {metrics['held_out_kl_before']:.4g} to "
            f"{metrics['held_out_kl']:.4g} nats a token. Above, prompted is the base behind the prompt."
        )
    if recipe.quantize:
        notes.append(
            f"The model was held as {recipe.quantize}; on the held-out responses that alone moves it by a KL of "
            f"{metrics['quantised_kl']:.4g} nats a token from the original, with the same most likely token at "
            f"{100 * metrics['quantised_agreement']:.1f} %."
        )
    return tuple(notes)


def _leaving(progress: Progress) -> Progress:
    """The same, and an end to the measuring where SIGTERM came; it is done again from its start."""

    def watched(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
        progress(stage, done, total, info)
        if done < total and hosts.stop_asked():
            raise Preempted("the delta is saved, and is measured again")

    return watched


def _write(outcome: Outcome, result: BakeResult, key: str) -> None:
    """The files for people; the evaluation last, for it says that all of them are there."""
    recipe, output = outcome.recipe, outcome.output
    write_whole(output / RECIPE, dump_recipe(recipe))
    plot(result.metrics, output / PLOT, title=recipe.name)
    notes = [f"Baked with jaxbake into `{recipe.model}`; the settings are in `{RECIPE}`.", f"![loss and KL]({PLOT})"]
    notes += outcome.notes
    write_whole(output / SUMMARY, report.summary_markdown(recipe.name, outcome.evaluation, notes))
    write_whole(output / EVALUATION, json.dumps({"key": key, **outcome.to_dict()}, indent=2, ensure_ascii=False) + "\n")


def evaluate_folder(
    folder: str | AnyPath,
    questions: str | Path | None = None,
    match: str | None = None,
    progress: Progress | None = None,
    mesh: str | None = None,
) -> Outcome:
    """Measures a finished bake again, on its own questions or on others; writes nothing."""
    folder = as_path(folder)
    with local_copy(folder / RECIPE) as file:
        recipe = load_recipe(file)
    items = _items(recipe, folder) if questions is None else load_items(questions, match or recipe.evaluation.match)
    base = load(recipe.model, dtype=recipe.dtype, mesh=mesh, quantize=recipe.quantize)
    delta, _ = load_delta(folder, base)
    return Outcome(recipe, folder, _measure(base, delta, recipe, folder, folder, items, progress or silent))


def evaluate_model(
    name: str,
    delta: str | Path | None = None,
    system: str | None = None,
    questions: str | Path | None = None,
    match: str = "contains",
    limit: int | None = None,
    progress: Progress | None = None,
    mesh: str | None = None,
) -> Scores:
    """Measures a model, with a delta and behind a prompt where given: on questions, or crumb on all its abilities.

    limit: how many questions at most; of the abilities, how many of each.
    """
    items = load_items(questions, match, limit) if questions is not None else None
    base = load(name, mesh=mesh)
    change = None if delta is None else load_delta(delta, base)[0]
    if items is not None:
        return score_items(base, change, items, system=system, progress=progress or silent)
    if not is_crumb(base):
        raise JaxbakeError(f"{name}: nothing is known of what it should answer; give --questions")
    if system is not None:
        raise JaxbakeError("--system goes with --questions; crumb's own questions bring their prompts")
    return score_abilities(base, change, per_ability=limit or 50)


def inside(recipe: Recipe, root: Path, folder: AnyPath) -> Recipe:
    """The same recipe as it reads in another folder, on any devices: its prompt inline, its files named from there."""

    def moved(config: Any, *names: str) -> Any:
        found = {name: getattr(config, name) for name in names}
        # what is not there is the name of a data set on the hub, or an error that is told where it is read
        here = {name: root / path for name, path in found.items() if path and (root / path).exists()}
        # from an object store no way leads back to this machine's files but their full names
        named = os.path.abspath if is_remote(folder) else lambda path: os.path.relpath(path, folder)
        return dataclasses.replace(config, **{name: named(path) for name, path in here.items()})

    prompts = {} if recipe.prompts_file else {"prompt": read_prompt(recipe, root), "prompt_file": None}
    return dataclasses.replace(
        moved(recipe, "prompts_file"),
        **prompts,
        stimuli=moved(recipe.stimuli, "file", "dataset"),
        bake=dataclasses.replace(
            recipe.bake, retention=moved(recipe.bake.retention, "pin_stimuli", "contexts_file"), mesh=None
        ),
        evaluation=moved(recipe.evaluation, "file", "abilities"),
    )


def _key(recipe: Recipe, folder: AnyPath) -> str:
    """A hash of the recipe and of all it names: files by content, a model's folder by what its files look like."""
    retention, evaluation = recipe.bake.retention, recipe.evaluation
    named = (
        recipe.stimuli.file,
        recipe.prompts_file,
        retention.pin_stimuli,
        retention.contexts_file,
        evaluation.file,
        evaluation.abilities,
    )
    start = "" if is_remote(folder) else folder
    paths = [Path(os.path.normpath(Path(start, name))) for name in named if name]  # the folder may not exist yet
    files = [sha256(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    models = [name for name in (recipe.model, recipe.bake.teacher.model) if name]
    folders = [CRUMB if name == "crumb" else Path(name) for name in models]
    found = [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    looks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return sha256(json.dumps([dataclasses.asdict(recipe), files, looks]))


def _finished(recipe: Recipe, folder: AnyPath, key: str) -> Outcome | None:
    """What the folder holds, if that is this very recipe, finished."""
    if not all((folder / name).exists() for name in (EVALUATION, RECIPE, DELTA, PEFT, SUMMARY, PLOT)):
        return None
    kept = read_json(folder / EVALUATION)
    if kept.get("key") != key:
        return None
    return Outcome(recipe, folder, Evaluation.from_dict(kept), kept["seconds"], True, tuple(kept["notes"]))


def _items(recipe: Recipe, root: Path) -> list:
    settings = recipe.evaluation
    return load_items(root / settings.file, settings.match, settings.limit) if settings.file else []


def _measure(
    base: Base, delta: Delta, recipe: Recipe, root: AnyPath, output: AnyPath, items: list, progress: Progress
) -> Evaluation:
    """All measurements there is material for; `root` is what the recipe's files are relative to."""
    settings = recipe.evaluation
    if is_crumb(base) and settings.abilities is None:
        material = smallworld_material(settings.limit or _KEPT)
    else:
        abilities = load_items(root / settings.abilities) if settings.abilities else []
        material = Material(abilities=tuple(abilities), unrelated=tuple(load_pins()[:_UNRELATED]))
    prompts = [text for text, _ in read_prompts(recipe, root)]
    # The prompted base is not what another model's bake is to come near to; the card has the KL to that model.
    examples = [] if recipe.bake.teacher.model else _held_out(base, prompts, output)
    return measure(
        base, delta, prompts, items=items, examples=examples, material=material,
        max_tokens=settings.max_tokens, progress=progress,
    )  # fmt: skip


def _held_out(base: Base, prompts: Sequence[str], output: AnyPath) -> list[Example]:
    """The held-out examples of a bake, from its trajectories."""
    rows = TrajectoryStore.open(output / TRAJECTORIES).load()
    return [
        example_from_response(
            base.tokenizer, kind=row.kind, prompt=prompts[row.prompt], context=row.context, messages=row.stimulus,
            response_ids=row.response_ids, number=row.prompt,
        )
        for row in rows
        if row.split == "held_out"
    ]  # fmt: skip
