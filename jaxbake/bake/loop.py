"""The bake: from a prompt and stimuli to a delta, resumable at any moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.folder import Runs, claim, read_metrics
from jaxbake.bake.lock import owned
from jaxbake.bake.other import Other
from jaxbake.bake.others import Contexts, contexts_for, pins_for
from jaxbake.bake.progress import Progress, silent
from jaxbake.bake.quantisation import quantised_kl
from jaxbake.bake.rollout import collect, write_stimuli
from jaxbake.bake.train import Trained, train
from jaxbake.bakery.card import FILE as CARD
from jaxbake.bakery.card import Card, make_card, sha256
from jaxbake.bakery.store import load_delta, save_delta
from jaxbake.config import BakeConfig, GenerateConfig, StimuliConfig
from jaxbake.data.chat import Example, example_from_response, prefix_ids, template_hash
from jaxbake.data.stimuli import deduplicate, load_stimuli, split_prompts
from jaxbake.data.trajectories import TrajectoryStore, fingerprint, plan_requests
from jaxbake.deltas.lora import Delta, init_delta
from jaxbake.errors import JaxbakeError
from jaxbake.files import AnyPath, absolute, as_path, read_json, write_whole
from jaxbake.models.base import Base, on_mesh

Prompts = Sequence[tuple[str, Sequence[str]]]
"""Texts to bake, each with user turns to be asked behind it."""


@dataclass(frozen=True)
class BakeResult:
    """What a bake gives.

    metrics: a dictionary per step, as in `metrics.jsonl`: "step" (updates so far), "loss", "grad_norm", "update_norm",
      "learning_rate", "tokens", and where it was evaluated "held_out_kl" (nats per token, to the prompted model) and
      "held_out_agreement" (share of tokens with the same most likely token). Step 0 is the base.
    kl_before, kl_after: held-out KL of the base and of this delta.
    output: the folder, or None. reused: the folder already held this bake, finished.
    """

    delta: Delta
    card: Card
    metrics: list[dict[str, float]]
    kl_before: float
    kl_after: float
    output: AnyPath | None = None
    reused: bool = False


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
    progress, root = progress or silent, Path(root)
    base = on_mesh(base, config.mesh, config.train.batch_size)
    prompts, generate = _prompts(base, prompt, prompts, stimuli, config, root)
    teacher = config.teacher.model if teacher is None else teacher
    other = None if teacher is None else Other(teacher, base)
    pins = pins_for(base, config, root) if pins is None else pins
    contexts = contexts_for(base, _longest(prompts), config, root) if contexts is None else contexts
    folder = None if output is None else absolute(output)
    identity = _identity(base, prompts, generate, pins, contexts, config, other)
    if folder and hosts.first(lambda: _is_finished(folder, identity)):
        return _finished(folder, base)
    with owned(folder) if folder else nullcontext():
        if folder:
            hosts.first(lambda: claim(folder, identity))
            _check_shared(folder)
        runs = Runs(folder, hosts.environment(base.mesh))
        if generate:
            prompts = _written(base, prompts, generate, folder, config.seed, progress, other)
        examples = _examples(base, prompts, config, pins, contexts, folder, progress, runs, other)
        trained = train(base, config, *examples, folder, progress, runs, other)
        name = name or (folder.name if folder else "bake")
        return _result(base, prompts, config, trained, examples[1], runs, name, recipe, output, other)


def _identity(
    base: Base, prompts: Prompts, generate, pins, contexts: Contexts, config: BakeConfig, other: Other | None = None
) -> dict[str, Any]:
    """What makes a bake this one and no other."""
    texts, turns = zip(*prompts, strict=True)
    given = list(turns) if len(prompts) > 1 else turns[0]
    return {
        "prompt": _hash(texts),
        "base": base.digest,
        "quantize": base.quantize,
        "template": template_hash(base.tokenizer),
        "stimuli": sha256(json.dumps(given)),
        "generate": asdict(generate) if generate else None,
        "pins": sha256(json.dumps(list(pins))),
        "contexts": sha256(json.dumps([[text, list(turns)] for text, turns in contexts])),
        "config": _decisive(config),
        **({"teacher": other.digest} if other else {}),
    }


def _hash(texts: Sequence[str]) -> str:
    """What names a prompt, or several in order."""
    return sha256(texts[0]) if len(texts) == 1 else sha256(json.dumps(list(texts)))


def _longest(prompts: Prompts) -> str:
    return max((text for text, _ in prompts), key=len)


def _result(
    base: Base,
    prompts: Prompts,
    config: BakeConfig,
    trained: Trained,
    held_out: Sequence[Example],
    runs: Runs,
    name: str,
    recipe: Any,
    output: str | AnyPath | None,
    other: Other | None = None,
) -> BakeResult:
    """What a bake came to, with its card; written where there is an output folder."""
    cost = quantised_kl(base, held_out) if base.quantize else {}
    kl = [row["held_out_kl"] for row in trained.metrics if row["step"] in (0, trained.step)]
    delta, texts = hosts.fetch(trained.delta), [text for text, _ in prompts]
    several = {"prompts": len(texts)} if len(texts) > 1 else {}
    card = make_card(
        base, delta, name=name, prompt=None if several else texts[0], prompt_sha256=_hash(texts),
        config=recipe or config, seeds={"bake": config.seed}, teacher=other,
        metrics={
            "held_out_kl_before": kl[0], "held_out_kl": kl[-1], "steps": trained.step,
            "useful_fraction": trained.useful_fraction, **several, **cost,
        },
        environment=runs.environment, resumes=runs.resumes,
    )  # fmt: skip
    if output:
        save_delta(delta, card, absolute(output) / layout.DELTA)
    return BakeResult(trained.delta, card, trained.metrics, kl[0], kl[-1], output and as_path(output))


def _is_finished(folder: AnyPath, identity: dict) -> bool:
    """Whether the folder holds this bake's delta. Raises JaxbakeError where it holds another bake."""
    if (folder / layout.IDENTITY).exists():
        claim(folder, identity)
    return (folder / layout.DELTA / CARD).exists()


def _check_shared(folder: AnyPath) -> None:
    """Raises JaxbakeError, in all processes, where one of them does not see the folder that process 0 made."""
    blind = [i for i, sees in enumerate(hosts.gather((folder / layout.IDENTITY).exists())) if not sees]
    if blind:
        raise JaxbakeError(
            f"{folder}: process {', '.join(map(str, blind))} does not see it; several processes need an output folder "
            "that all of them share: a network file system, or gs://"
        )


def _finished(folder: AnyPath, base: Base) -> BakeResult:
    """The bake that a folder already holds."""
    delta, card = load_delta(folder / layout.DELTA, base)
    kl = [card.metrics["held_out_kl_before"], card.metrics["held_out_kl"]]
    return BakeResult(delta, card, read_metrics(folder / layout.METRICS), *kl, folder, reused=True)


def _prompts(
    base: Base, prompt: str | None, prompts: Prompts | None, stimuli: Any, config: BakeConfig, root: Path
) -> tuple[list[tuple[str, list[str]]], Any]:
    """What is baked, each text with the user turns there already are; and how many more the model is to write for each
    (a GenerateConfig) or None."""
    if prompts is None:
        text = _check(base, prompt, config)
        given, generate = _given(stimuli, root)
        return [(text, given)], generate
    if prompt is not None:
        raise JaxbakeError("prompt: is given beside prompts; give one of them")
    common, generate = ([], None) if stimuli is None else _given(stimuli, root, needed=False)
    found = []
    for number, pair in enumerate(prompts):
        where = f"prompts[{number}]"
        if isinstance(pair, str) or len(pair) != 2 or isinstance(pair[1], str):
            raise JaxbakeError(f"{where}: must be a text and a list of its user turns, is {pair!r:.60}")
        try:
            turns = _given([*pair[1], *common], root, needed=generate is None)[0]
            found.append((_check(base, pair[0], config), turns))
        except JaxbakeError as error:
            raise JaxbakeError(f"{where}: {error}") from error
    if not found:
        raise JaxbakeError("prompts: there are none; give at least one text with its user turns")
    return found, generate


def _check(base: Base, prompt: str | None, config: BakeConfig) -> str:
    """The prompt, once prompt, model and settings are known to fit each other."""
    if base.tokenizer is None:
        raise JaxbakeError(f"{base.name}: has no tokenizer, so no prompt can be baked into it")
    if not isinstance(prompt, str) or not prompt.strip():
        raise JaxbakeError("prompt: is missing or empty; give the text to bake")
    length = len(prefix_ids(base.tokenizer, prompt, ""))
    if length >= base.config.max_positions:
        raise JaxbakeError(
            f"prompt: {length} tokens are longer than the model's context of {base.config.max_positions}; shorten it"
        )
    jax.eval_shape(lambda key: init_delta(key, base.config, config.lora), jax.random.key(0))  # rank and targets fit
    return prompt


def _given(stimuli: Any, root: Path, needed: bool = True) -> tuple[list[str], Any]:
    """Stimuli there already are, and how many the model is to write (a GenerateConfig) or None."""
    if stimuli is None or isinstance(stimuli, str):
        raise JaxbakeError("stimuli: give a list of user turns, or a StimuliConfig that says where they come from")
    if isinstance(stimuli, StimuliConfig):
        given = load_stimuli(stimuli, root)
        generate = stimuli.generate if stimuli.generate.count else None
    else:
        given, generate = list(stimuli), None
        if not all(isinstance(text, str) for text in given):
            raise JaxbakeError("stimuli: each must be a text, a user turn")
        given = deduplicate(given)
    if needed and not given and not generate:
        raise JaxbakeError("stimuli: there are none; give items, a file, a dataset, or generate.count")
    return given, generate


def _decisive(config: BakeConfig) -> dict[str, Any]:
    """The settings that the delta depends on."""
    settings = asdict(config)
    del settings["mesh"], settings["teacher"]["model"]  # of a teacher, its digest counts
    for name in ("checkpoint_every", "tensorboard", "teacher_device_gb", "teacher_host_gb", "teacher_disk_gb"):
        del settings["train"][name]
    for name in ("pin_stimuli", "contexts_file"):  # what they hold counts, not where
        del settings["retention"][name]
    return settings


def _written(
    base: Base,
    prompts: Prompts,
    generate: GenerateConfig,
    folder: AnyPath | None,
    seed: int,
    progress: Progress,
    other: Other | None = None,
) -> list[tuple[str, list[str]]]:
    """The prompts with the stimuli given and those the teacher writes, which are kept in the folder."""
    path = folder and folder / layout.STIMULI
    written = hosts.first(lambda: read_json(path)["written"] if path and path.exists() else None)
    if written is None:
        writer = other.load() if other else base
        written = [
            write_stimuli(writer, text, generate, seed=seed + number, progress=progress)
            for number, (text, _) in enumerate(prompts)
        ]
        if path:
            text = json.dumps({"written": written}, indent=2, ensure_ascii=False) + "\n"
            hosts.first(lambda: write_whole(path, text))
    return [(text, deduplicate([*given, *new])) for (text, given), new in zip(prompts, written, strict=True)]


def _examples(
    base: Base,
    prompts: Prompts,
    config: BakeConfig,
    pins: Sequence[str],
    contexts: Contexts,
    folder: AnyPath | None,
    progress: Progress,
    runs: Runs,
    other: Other | None = None,
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, from responses that are sampled now or already there."""
    texts = [text for text, _ in prompts]
    train_stimuli, held_out = split_prompts([turns for _, turns in prompts], config.train.held_out, config.seed)
    requests = plan_requests(
        train_stimuli, held_out, config.sampling, config.retention, pins, contexts, seed=config.seed
    )
    key = fingerprint(
        prompt=texts if len(texts) > 1 else texts[0], base_digest=base.digest,
        template_hash=template_hash(base.tokenizer), sampling=config.sampling, requests=requests, seed=config.seed,
        **({"teacher": other.digest} if other else {}),
    )  # fmt: skip
    store = TrajectoryStore.open(folder / layout.TRAJECTORIES, key) if folder else TrajectoryStore()
    runs.note(responses=len(store.done()))
    if other is None:
        collect(base, texts, requests, store, config.sampling, progress)
    else:  # pins are to change nothing, so their answers are the base's own
        pinned = [request for request in requests if request.kind == "pin"]
        rest = [request for request in requests if request.kind != "pin"]
        if not {request.index for request in rest} <= store.done():
            collect(other.load(), texts, rest, store, config.sampling, _counted(progress, 0, len(requests)))
        collect(base, texts, pinned, store, config.sampling, _counted(progress, len(rest), len(requests)))
    examples: dict[str, list[Example]] = {"train": [], "held_out": []}
    for row in store.load():
        examples[row.split].append(
            example_from_response(
                base.tokenizer,
                kind=row.kind,
                prompt=texts[row.prompt],
                context=row.context,
                messages=row.stimulus,
                response_ids=row.response_ids,
                number=row.prompt,
                teacher_tokenizer=other.tokenizer if other and row.kind != "pin" else None,
            )
        )
    return examples["train"], examples["held_out"]


def _counted(progress: Progress, start: int, total: int) -> Progress:
    """The same, for a part of the responses."""
    return lambda stage, done, _, info: progress(stage, start + done, total, info)
