"""Responses of the prompted model, drawn in fixed batches and kept as they come; and stimuli it writes itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxbake import hosts
from jaxbake.bake.progress import Progress, silent
from jaxbake.config import GenerateConfig, SamplingConfig
from jaxbake.data.chat import prefix_ids, system_prompts
from jaxbake.data.stimuli import deduplicate, parse_generated, seed_requests
from jaxbake.data.trajectories import Request, Trajectory, TrajectoryStore
from jaxbake.errors import JaxbakeError, Preempted
from jaxbake.models.base import Base
from jaxbake.sampling import Generation, generate, sample_ids, shared_prefix
from jaxbake.sampling.text import SHARE_FROM, common_prefix, response_text


def collect(
    base: Base,
    prompts: Sequence[str],
    requests: Sequence[Request],
    store: TrajectoryStore,
    sampling: SamplingConfig,
    progress: Progress = silent,
) -> None:
    """Fills the store with a response to every request that has none yet.

    Each is drawn by the base as the teacher sees it: "bake" rows behind their prompt, "context" rows behind the prompt
    and the other one, "pin" rows behind nothing. What the rows of a prompt begin with is computed once. A batch is a
    fixed group of requests for one prompt, those of like length together; it is written whole when it is done, so a
    collection that was killed and run again ends with the same responses.

    Raises JaxbakeError where a request and its response cannot fit the model's context, Preempted after a SIGTERM.
    """
    if not requests:
        return
    views = [_view(base, prompts[request.prompt], request) for request in requests]
    check_room(base, views, requests, sampling.max_tokens)
    asked: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        asked.setdefault(request.prompt, []).append(i)
    common = {n: _shared_tokens([views[i] for i in mine], [requests[i] for i in mine]) for n, mine in asked.items()}
    beginning = [_match(ids, common[request.prompt]) for ids, request in zip(views, requests, strict=True)]
    seen = [
        min(n, ids.size - 1) for ids, n in zip(views, beginning, strict=True)
    ]  # a token stays, to predict the first
    rows = [ids[n:] for ids, n in zip(views, seen, strict=True)]
    groups = [group for mine in asked.values() for group in _groups(rows, mine, sampling.batch_size)]
    done, width = store.done(), max(map(len, groups))
    pending = [
        (group, length)
        for group, length in zip(groups, _lengths(rows, groups), strict=True)
        if not all(requests[i].index in done for i in group)
    ]
    finished = len(requests) - sum(len(group) for group, _ in pending)
    progress("sample", finished, len(requests), {})
    if not pending:
        return
    number, prefix = None, None
    for group, length in pending:
        if requests[group[0]].prompt != number:
            number, prefix = requests[group[0]].prompt, None  # gone before the next one comes
            tokens = common[number]
            prefix = shared_prefix(base.params, None, tokens, config=base.config) if tokens.size else None
        # A group that is not full is filled up with its own last row: one more shape would cost more to compile.
        filled = group + group[-1:] * (width - len(group))
        generations = generate(
            base.params, None, [rows[i] for i in filled],
            config=base.config, prefix=prefix, prefix_visible=[seen[i] for i in filled],
            max_tokens=sampling.max_tokens, temperature=[requests[i].temperature for i in filled],
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p, stop_ids=base.eos_ids,
            seeds=[requests[i].seed for i in filled], min_length=length,
        )  # fmt: skip
        drawn = zip(group, generations[: len(group)], strict=True)
        store.write_part([_trajectory(base, requests[i], generation, sampling.stop) for i, generation in drawn])
        finished += len(group)
        progress("sample", finished, len(requests), {})
        if finished < len(requests) and hosts.stop_asked():
            raise Preempted(f"{finished} of {len(requests)} responses are kept")


def write_stimuli(
    base: Base, prompt: str, config: GenerateConfig, *, seed: int, progress: Progress = silent, batch_size: int = 32
) -> list[str]:
    """At most `config.count` distinct stimuli that the model itself writes for the prompt; repeatable.

    Raises JaxbakeError where nothing usable comes.
    """
    asked = seed_requests(prompt, config)
    prompts = [prefix_ids(base.tokenizer, None, messages) for _, messages in asked]
    progress("write stimuli", 0, len(asked), {})
    generations = sample_ids(
        base, prompts, seed=seed, max_tokens=config.max_tokens, temperature=config.temperature, batch_size=batch_size
    )
    texts = [parse_generated(response_text(base.tokenizer, g)) for g in generations if g.finished]
    stimuli = deduplicate(text for text in texts if text is not None)
    progress("write stimuli", len(asked), len(asked), {"kept": len(stimuli)})
    if not stimuli:
        raise JaxbakeError(
            f"stimuli.generate: the model wrote nothing usable in {len(asked)} attempts; "
            "give stimuli as items or a file, or raise stimuli.generate.max_tokens"
        )
    return stimuli


def check_room(base: Base, prompts: Sequence[np.ndarray], requests: Sequence[Request], max_tokens: int) -> None:
    """Raises JaxbakeError where a prompt, its stimulus and the response are longer than the model's context."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) + max_tokens > base.config.max_positions:
        raise JaxbakeError(
            f"stimulus {requests[longest].stimulus[:40]!r} behind its prompt is {len(prompts[longest])} tokens; with "
            f"sampling.max_tokens {max_tokens} that exceeds the model's context of {base.config.max_positions}; "
            "shorten the prompt or the stimulus, or lower max_tokens"
        )


def _view(base: Base, prompt: str, request: Request) -> np.ndarray:
    teacher, _ = system_prompts(request.kind, prompt, request.context)
    return prefix_ids(base.tokenizer, teacher, request.stimulus)


def _groups(rows: Sequence[np.ndarray], which: Sequence[int], size: int) -> list[list[int]]:
    """These rows in groups of `size`, shortest first, ties in order: the same whatever has been drawn already."""
    order = sorted(which, key=lambda i: (rows[i].size, i))
    return [order[at : at + size] for at in range(0, len(order), size)]


def _lengths(rows: Sequence[np.ndarray], groups: list[list[int]]) -> list[int]:
    """To what length each group's rows are padded: few lengths, each a third of the next at most.

    Padding costs a group little, for its time goes into decoding; a length of its own is one more program to compile.
    """
    longest = np.array([rows[group[-1]].size for group in groups])
    lengths, length = longest.copy(), 0
    for at in np.argsort(-longest, kind="stable"):
        length = int(longest[at]) if not length or 3 * longest[at] < length else length
        lengths[at] = length
    return lengths.tolist()


def _shared_tokens(prompts: Sequence[np.ndarray], requests: Sequence[Request]) -> np.ndarray:
    """What all "bake" rows begin with, where that is long enough to be worth a prefix of its own."""
    prompted = [p for p, request in zip(prompts, requests, strict=True) if request.kind == "bake"]
    length = common_prefix(prompted)
    return prompted[0][:length] if length >= SHARE_FROM else np.zeros(0, np.int32)


def _match(a: np.ndarray, b: np.ndarray) -> int:
    n = min(a.size, b.size)
    return int(np.argmin(np.append(a[:n] == b[:n], False)))


def _trajectory(base: Base, request: Request, generation: Generation, stops: Sequence[str]) -> Trajectory:
    generation = _cut_at(base, generation, stops)
    return Trajectory(
        **vars(request),
        response=response_text(base.tokenizer, generation),
        response_ids=tuple(int(i) for i in generation.tokens),
        logprob=float(np.sum(generation.logprobs, dtype=np.float64)),
        finished=generation.finished,
    )


def _cut_at(base: Base, generation: Generation, stops: Sequence[str]) -> Generation:
    """The response up to the token that completes a stop text (that token stays: it is learned as the end)."""
    if not stops:
        return generation
    tokens = generation.tokens.tolist()
    for length in range(1, len(tokens)):
        if any(stop in base.tokenizer.decode(tokens[:length]) for stop in stops):
            return Generation(generation.tokens[:length], generation.logprobs[:length], False)
    return generation
