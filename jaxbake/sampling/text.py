"""Text in, text out: sampling from a base, and streaming for a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxbake.data.chat import prefix_ids
from jaxbake.errors import JaxbakeError
from jaxbake.sampling.generate import Generation, check_room, generate, prepare, shared_prefix

Conversation = str | Sequence[dict]

SHARE_FROM = 16  # prompts with fewer tokens in common are not worth a prefix of their own
CHUNK = 8  # tokens decoded per device call when streaming


def sample(
    base: Any,
    messages_or_texts: Conversation | Sequence[Conversation],
    delta: Any = None,
    system: str | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    tools: list | None = None,
    batch_size: int = 64,
) -> str | list[str]:
    """What the model answers: a text for one question, a list for many.

    Args:
      base: a `models.base.Base`.
      messages_or_texts: one str (a user turn where the model has a chat template, plain text to continue otherwise),
        one conversation (a list of {"role", "content"}), or a list of either.
      delta: a `Delta` to answer with, or None for the base alone.
      system: a prompt put before every conversation.
      max_tokens, temperature, top_k, top_p, min_p: as for `generate`; temperature 0 takes the most likely token.
      seed: below 2**32; the i-th question has its own stream of random numbers, made from (seed, i).
      stop: texts at whose first occurrence an answer is cut.
      tools: descriptions of tools, for the chat template.
      batch_size: rows sampled at once.

    Raises JaxbakeError for anything else, and as `generate`.
    """
    many = _is_many(messages_or_texts)
    conversations = messages_or_texts if many else [messages_or_texts]
    prompts = [_prompt(base, conversation, system, tools) for conversation in conversations]
    generations = sample_ids(
        base, prompts, delta, seed=seed, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, batch_size=batch_size,
    )  # fmt: skip
    texts = [cut(response_text(base.tokenizer, generation), _stops(stop)) for generation in generations]
    return texts if many else texts[0]


def sample_ids(
    base: Any,
    prompts: Sequence[np.ndarray],
    delta: Any = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    **options,
) -> list[Generation]:
    """As `sample` with token ids in and `Generation`s out: rows sorted by length into batches, what all prompts begin
    with computed once. `options` as for `generate`.

    Batches of one call have one shape, the longest prompt's: to compile costs more than to compute some padding.
    """
    if batch_size < 1:
        raise JaxbakeError(f"batch_size: {batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise JaxbakeError(f"seed: {seed} must be from 0 to 2**32 - 1")
    common = common_prefix(prompts)
    options.setdefault("stop_ids", base.eos_ids)
    check_room(prompts, [0] * len(prompts), options["max_tokens"], base.config)
    if len(prompts) > 1 and common >= SHARE_FROM:
        options["prefix"] = shared_prefix(base.params, delta, prompts[0][:common], config=base.config)
        options["prefix_visible"] = common
    else:
        common = 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    options.setdefault("min_length", max(map(len, prompts), default=0) - common)
    results: list[Any] = [None] * len(prompts)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        if at:
            rows += rows[-1:] * (batch_size - len(rows))  # a last batch is filled up with its own last row
        generations = generate(
            base.params, delta, [prompts[i][common:] for i in rows], config=base.config,
            seeds=[(seed << 32) + i for i in rows], **options,
        )  # fmt: skip
        for i, generation in zip(rows, generations, strict=True):
            results[i] = generation
    return results


def stream(
    base: Any,
    messages: Conversation,
    delta: Any = None,
    system: str | None = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    tools: list | None = None,
) -> Iterator[str]:
    """Yields one answer in pieces as it is decoded; joined they are what `sample` returns for the same arguments.

    An answer ends where the model's context does, if that comes before max_tokens.
    """
    prompt = _prompt(base, messages, system, tools)
    room = base.config.max_positions - len(prompt)
    if room < 1:
        raise JaxbakeError(
            f"the conversation has {len(prompt)} tokens and fills the model's context of {base.config.max_positions}; "
            "start a new one"
        )
    run = prepare(
        base.params, delta, [prompt], config=base.config, max_tokens=min(max_tokens, room), temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, stop_ids=base.eos_ids, seeds=[seed << 32],
    )  # fmt: skip
    pieces, stops = Pieces(base.tokenizer), StopTexts(_stops(stop))
    state, done, over = run.start(), 0, False
    while not over:
        length, finished = int(state.lengths[0]), bool(state.finished[0])
        over = finished or length >= run.max_tokens
        tokens = np.asarray(state.tokens[0, done : length - finished])  # the stop token has no text
        done = length
        text = stops.feed(pieces.feed(tokens.tolist(), last=over), last=over)
        if text:
            yield text
        if stops.found:
            return
        if not over:
            state = run.advance(state, length + CHUNK)


def response_text(tokenizer, generation: Generation) -> str:
    """The text of a response, without its stop token and other special tokens."""
    tokens = generation.tokens[:-1] if generation.finished else generation.tokens
    return _decode(tokenizer, tokens.tolist())


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the stop text that is complete first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all prompts begin with, at least one of each left over."""
    if not prompts:
        return 0
    shortest = min(len(prompt) for prompt in prompts)
    first = np.asarray(prompts[0][:shortest])
    same = np.all([np.asarray(prompt[:shortest]) == first for prompt in prompts], axis=0)
    return max(min(int(np.argmin(np.append(same, False))), shortest - 1), 0)


class Pieces:
    """Tokens to text a few at a time. Text whose characters are not whole yet is held back until they are."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def feed(self, ids: list[int], *, last: bool = False) -> str:
        """The text these tokens complete; `last` gives out what was held back as well."""
        # Decoded from the start each time: what a token's text is depends on those before it (leading spaces, bytes).
        self._ids += ids
        text = _decode(self._tokenizer, self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        piece, self._given = text[self._given :], len(text)
        return piece


class StopTexts:
    """Cuts a text that comes in pieces at the first stop text; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, piece: str, *, last: bool = False) -> str:
        """What can be given out now."""
        text = self._held + piece
        whole = cut(text, self._stops)
        if len(whole) < len(text):
            self.found, self._held = True, ""
            return whole
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise JaxbakeError("stop: an empty text would end every answer at once; leave it out")
    return stops


def _is_many(given) -> bool:
    if isinstance(given, str):
        return False
    if isinstance(given, (list, tuple)):
        if all(isinstance(x, dict) for x in given) and given:
            return False
        if all(isinstance(x, (str, list, tuple)) for x in given):
            return True
    raise JaxbakeError(
        "sample takes a text, a conversation (a list of {'role', 'content'}), or a list of either; "
        f"got {type(given).__name__} {given!r:.80}"
    )


def _prompt(base, conversation: Conversation, system: str | None, tools) -> np.ndarray:
    if base.tokenizer is None:
        raise JaxbakeError(f"{base.name}: has no tokenizer, so it cannot be given text; use token ids and `generate`")
    return prefix_ids(base.tokenizer, system, conversation, tools)
