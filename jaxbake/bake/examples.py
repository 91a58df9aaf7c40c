"""The examples of a bake: its user turns, answered by the teacher, some held out."""

from __future__ import annotations

import json

from jaxbake import hosts
from jaxbake.bake import folder as layout
from jaxbake.bake.folder import Runs
from jaxbake.bake.job import Job, Prompts
from jaxbake.bake.progress import Progress
from jaxbake.bake.rollout import collect, write_stimuli
from jaxbake.data.chat import Example, example_from_response, template_hash
from jaxbake.data.stimuli import deduplicate, split_prompts
from jaxbake.data.trajectories import TrajectoryStore, fingerprint, plan_requests
from jaxbake.files import read_json, write_whole
from jaxbake.models.base import Base


def make_examples(base: Base, job: Job, runs: Runs, progress: Progress) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, from responses that are sampled now or already in the job's folder."""
    prompts = _written(base, job, progress) if job.generate else job.prompts
    config, other, folder, texts = job.config, job.other, job.folder, job.texts
    train_stimuli, held_out = split_prompts([turns for _, turns in prompts], config.train.held_out, config.seed)
    requests = plan_requests(
        train_stimuli, held_out, config.sampling, config.retention, job.pins, job.contexts, seed=config.seed
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


def _written(base: Base, job: Job, progress: Progress) -> Prompts:
    """The prompts with the user turns given and those the teacher writes, which are kept in the folder."""
    path = job.folder and job.folder / layout.STIMULI
    written = hosts.first(lambda: read_json(path)["written"] if path and path.exists() else None)
    if written is None:
        writer = job.other.load() if job.other else base
        written = [
            write_stimuli(writer, text, job.generate, seed=job.config.seed + number, progress=progress)
            for number, (text, _) in enumerate(job.prompts)
        ]
        if path:
            text = json.dumps({"written": written}, indent=2, ensure_ascii=False) + "\n"
            hosts.first(lambda: write_whole(path, text))
    return [(text, deduplicate([*given, *new])) for (text, given), new in zip(job.prompts, written, strict=True)]


def _counted(progress: Progress, start: int, total: int) -> Progress:
    """The same, for a part of the responses."""
    return lambda stage, done, _, info: progress(stage, start + done, total, info)
