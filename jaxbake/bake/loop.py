"""The bake: from a prompt and stimuli to a delta, resumable at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jaxbake import hosts
from jaxbake.bake.examples import make_examples
from jaxbake.bake.folder import Runs, claim_shared
from jaxbake.bake.job import Prompts, make_job
from jaxbake.bake.lock import owned
from jaxbake.bake.other import Other
from jaxbake.bake.others import Contexts
from jaxbake.bake.progress import Progress, silent
from jaxbake.bake.result import BakeResult, is_finished, make_result, read_result
from jaxbake.bake.train import train
from jaxbake.config import BakeConfig, StimuliConfig
from jaxbake.files import AnyPath, absolute
from jaxbake.models.base import Base, on_mesh


def bake(
    base: Base,
    prompt: str | None = None,
    stimuli: Sequence[str] | StimuliConfig | None = None,
    config: BakeConfig = BakeConfig(),  # noqa: B008 (frozen)
    output: str | AnyPath | None = None,
    *,
    prompts: Prompts | None = None,
    teacher: Base | str | None = None,
    pins: Sequence[str] | None = None,
    contexts: Contexts | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    recipe: dict[str, Any] | None = None,
    root: str | Path = ".",
) -> BakeResult:
    """Bakes a prompt into a low-rank delta: the base with it, unprompted, answers as the base does behind the prompt.

    Samples responses of the prompted base to the stimuli, then minimises the divergence between its next-token
    distributions and those of the unprompted base with the delta (Prompt Baking, arXiv 2409.13697).

    Args:
      base: what `jaxbake.load` gives; it is not changed.
      prompt: the text to bake, a system prompt where the model has a chat template.
      stimuli: user turns to answer, or a `StimuliConfig` saying where they are; with its `generate`, the model writes
        (more of) them.
      config: settings of delta, sampling, retention rows, loss, optimizer and loop.
      output: folder for trajectories, checkpoints, metrics and the delta, local or gs://. The same call with the same
        folder continues a bake that was interrupted (bitwise in the same environment, to rounding on another mesh or
        number of processes; the card says which), and returns one that was finished. None writes nothing.
      prompts: in place of `prompt`, several texts for one delta (documents with their questions, say), each with user
        turns of its own, behind which `stimuli` are asked too. Each is read once, and the teacher of a response reads
        its own alone.
      teacher: another model with the base's vocabulary that answers and is imitated, behind the prompt: a `Base`, or
        a name for `jaxbake.load`; by default `config.teacher.model`, or the base itself. It is asked once, what it says
        is kept as `config.teacher.top_k` likeliest tokens and the mass of the others, and weights that were loaded here
        are let go before the training. KLs are then those over these outcomes.
      pins: user turns on which nothing may change; by default those of `config.retention.pin_stimuli`, or shipped ones.
      contexts: other prompts with their user turns, whose reading is to be kept; by default
        `config.retention.contexts_file`, or those of the shipped ones that fit the model's context.
      progress: called as work advances.
      name: of the delta, on its card; by default that of the folder.
      recipe: what the card keeps as settings instead of `config`.
      root: what paths in `stimuli` and `config` are relative to.

    Several processes (see `jaxbake.hosts`) all make the same call, with a base on a mesh over all their devices.
    With `train.patience` the result is the delta of the lowest held-out KL, otherwise the last one.

    Raises:
      JaxbakeError: an empty prompt or no stimuli, a prompt or stimulus too long for the model's context, settings the
        model cannot take, an output folder that holds another bake, or in which another one is at work, or which
        cannot be written, a damaged checkpoint.
      TrainingDiverged: a loss that is not finite; the last good state is kept.
      Preempted: SIGTERM came, and everything is saved; after `hosts.start` only.
    """
    progress = progress or silent
    base = on_mesh(base, config.mesh, config.train.batch_size)
    teacher = config.teacher.model if teacher is None else teacher
    other = None if teacher is None else Other(teacher, base)
    folder = None if output is None else absolute(output)
    job = make_job(
        base, prompt, prompts, stimuli, config, other=other, pins=pins, contexts=contexts, folder=folder,
        root=Path(root),
    )  # fmt: skip
    if folder and hosts.first(lambda: is_finished(job)):
        return read_result(job, base)
    with owned(folder) if folder else nullcontext():
        if folder:
            claim_shared(folder, job.identity)
        runs = Runs(folder, hosts.environment(base.mesh))
        examples, held_out = make_examples(base, job, runs, progress)
        trained = train(base, config, examples, held_out, folder, progress, runs, other)
        name = name or (folder.name if folder else "bake")
        return make_result(base, job, trained, held_out, runs, name, recipe)
