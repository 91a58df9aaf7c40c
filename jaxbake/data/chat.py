"""Messages to views: token ids of the teacher's and the student's prefix, and the tail both share.

Models with a chat template are spoken to through it, the prompt as system message. Models without one read plain text:
BOS, then the prompt, a line break (only where a stimulus follows), then the stimulus. The pieces are tokenized one by
one, so a piece has the same ids whatever stands before it; a stimulus may be empty (the response then continues the
prompt, or for the student starts the text).

Sampled responses keep their sampled ids and are never tokenized again, so the tail is the same in both views by
construction. Written dialogues are rendered in both views and compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxbake.errors import JaxbakeError

Messages = Sequence[dict]
KINDS = ("bake", "pin", "context")
_SAME = object()


@dataclass(frozen=True, eq=False)
class Example:
    """One tail seen behind two prefixes; all ids are int32 arrays of one dimension.

    kind: "bake" (teacher prompted, student not), "pin" (equal prefixes: do not change here) or "context" (another
      prompt o in both views, teacher [u + o], student [o]: keeps later prompts readable).
    tail: the tokens common to both views, after the prefixes.
    mask: bool over tail, the tokens to be matched: assistant tokens and the end-of-turn token.
    weight: how much each of its tokens counts.
    prompt: which of a bake's prompts stands in the teacher's prefix, counted from 0.
    """

    kind: str
    teacher_prefix: np.ndarray
    student_prefix: np.ndarray
    tail: np.ndarray
    mask: np.ndarray
    weight: float = 1.0
    prompt: int = 0


def has_template(tokenizer) -> bool:
    """Whether the model has a chat template; without one it is given plain text."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_hash(tokenizer) -> str:
    """sha256 of the chat template, "none" without one: what the views of a bake depend on beside the base."""
    if not has_template(tokenizer):
        return "none"
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def join_prompts(first: str, second: str) -> str:
    """Two prompts as one, an empty line between."""
    return f"{first}\n\n{second}"


def with_system(prompt: str | None, messages: Messages) -> list[dict]:
    """The messages under a system prompt; one they already have is kept and stands after it. None changes nothing."""
    if not prompt:
        return list(messages)
    if messages and messages[0].get("role") == "system":
        prompt, messages = join_prompts(prompt, messages[0]["content"]), messages[1:]
    return [{"role": "system", "content": prompt}, *messages]


def system_prompts(kind: str, prompt: str | None, context: str | None) -> tuple[str | None, str | None]:
    """What teacher and student have as system prompt: (u, none), (none, none) for a pin, (u + o, o) for a context."""
    if kind == "bake":
        return prompt, None
    if kind == "pin":
        return None, None
    if kind == "context":
        if not context:
            raise JaxbakeError("a context row needs the other prompt it is about")
        return (join_prompts(prompt, context) if prompt else context), context
    raise JaxbakeError(f"unknown kind of example '{kind}'; known: {', '.join(KINDS)}")


def _checked(messages: Messages) -> list[dict]:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise JaxbakeError(f"message {i}: needs 'role' and 'content', got {message!r:.80}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise JaxbakeError(f"message {i} ({message['role']}): 'content' must be text, got {type(content).__name__}")
    return list(messages)


def _missing(text: str, messages: Messages) -> int | None:
    """Which message other than the assistant's the rendered text leaves out (white space at its ends aside)."""
    for i, message in enumerate(messages):
        content = (message.get("content") or "").strip()
        # Some templates write tool results as JSON strings.
        if message["role"] != "assistant" and content not in text:
            if message["role"] in ("tool", "ipython") and json.dumps(content, ensure_ascii=False)[1:-1] in text:
                continue
            return i
    return None


def _folded(messages: Messages) -> list[dict] | None:
    """The system message written at the top of the first user turn, None where there is nothing to fold."""
    user = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if not messages or messages[0]["role"] != "system" or user is None:
        return None
    text = join_prompts(messages[0]["content"], messages[user]["content"])
    return [*messages[1:user], {**messages[user], "content": text}, *messages[user + 1 :]]


def render(tokenizer, messages: Messages, *, tools: list | None = None, generate: bool = False) -> str:
    """The conversation as text, through the chat template; `generate` ends it where the assistant is to speak.

    Where the template refuses or drops system messages (Gemma 1 and 2), the system text is written at the top of the
    first user turn, as Gemma 3's own template does. Raises JaxbakeError without a template, where the template refuses
    the messages, and where it leaves one out.
    """
    from jinja2 import TemplateError

    if not has_template(tokenizer):
        raise JaxbakeError("this tokenizer has no chat template, so it cannot be given messages; give plain text")
    messages = _checked(messages)

    def apply(messages):
        return tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=generate
        )

    def attempt(messages) -> tuple[str | None, str]:
        try:
            text = apply(messages)
        except TemplateError as e:
            return None, f"the model's chat template refuses these messages: {e}"
        except (TypeError, KeyError, AttributeError, ValueError) as e:
            return None, f"the model's chat template cannot render these messages: {type(e).__name__}: {e}"
        if (i := _missing(text, messages)) is not None:
            return None, f"the model's chat template leaves out message {i} (role '{messages[i]['role']}')"
        return text, ""

    text, error = attempt(messages)
    if text is None and (folded := _folded(messages)) is not None:
        text, _ = attempt(folded)
    if text is None:
        raise JaxbakeError(error)
    return text


def _ids(tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def text_ids(tokenizer, text: str, bos: bool = True) -> np.ndarray:
    """Token ids of plain text, int32 [n]; BOS in front if wanted and if the tokenizer has one."""
    ids = _ids(tokenizer, text)
    if bos and tokenizer.bos_token_id is not None:
        ids = np.concatenate([np.int32([tokenizer.bos_token_id]), ids])
    return ids


def prompt_ids(tokenizer, messages: Messages, tools: list | None = None) -> np.ndarray:
    """Token ids of a conversation up to where the assistant is to speak, int32 [n]. Raises as `render`."""
    return _ids(tokenizer, render(tokenizer, messages, tools=tools, generate=True))


def prefix_ids(tokenizer, system: str | None, turns: str | Messages, tools: list | None = None) -> np.ndarray:
    """Everything before the response, int32 [n]: what the sampler is given and what the views start with.

    turns: a stimulus (a user turn, or plain text for a model without a template) or messages.
    """
    if has_template(tokenizer):
        messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        return prompt_ids(tokenizer, with_system(system, messages), tools)
    if not isinstance(turns, str):
        turns = _checked(turns)
        if tools or len(turns) != 1 or turns[0]["role"] != "user":
            raise JaxbakeError(
                "this tokenizer has no chat template: it can be given one user turn as plain text, no other messages"
            )
        turns = turns[0]["content"]
    pieces = [text_ids(tokenizer, "")]
    if system:
        pieces.append(_ids(tokenizer, f"{system}\n" if turns and not system[-1].isspace() else system))
    if turns:
        pieces.append(_ids(tokenizer, turns))
    return np.concatenate(pieces)


def example_from_response(
    tokenizer,
    *,
    kind: str,
    prompt: str | None,
    context: str | None = None,
    messages: str | Messages,
    response_ids: Sequence[int] | np.ndarray,
    tools: list | None = None,
    weight: float = 1.0,
    number: int = 0,
    teacher_tokenizer=None,
) -> Example:
    """The two views of a sampled response; all its tokens are matched.

    Args:
      kind: "bake" (teacher's system prompt u, student's none), "pin" (none, none), "context" (u + o, o).
      prompt, context: u and o.
      messages: the conversation before the response, or the stimulus.
      response_ids: as sampled, with the end-of-turn token where it was drawn.
      number: which of several prompts u is.
      teacher_tokenizer: the teacher's, where it is another model with a chat template of its own.

    Raises JaxbakeError for an empty response, for messages the template refuses, and where a view has no token to
    predict the response from.
    """
    teacher, student = system_prompts(kind, prompt, context)
    tail = np.asarray(response_ids, np.int32)
    if tail.size == 0:
        raise JaxbakeError("a response without tokens cannot be baked; it needs at least the end-of-turn token")
    sides = ((teacher_tokenizer or tokenizer, teacher), (tokenizer, student))
    views = [prefix_ids(tokenizer, system, messages, tools) for tokenizer, system in sides]
    return replace(_example(kind, *views, tail, np.ones(tail.size, bool), weight), prompt=number)


def example_from_text(tokenizer, teacher_prefix: str, student_prefix: str, text: str, *, kind: str = "bake") -> Example:
    """The two views of plain text: BOS and a prefix each, then the text, all of whose tokens are matched."""
    tail = _ids(tokenizer, text)
    if tail.size == 0:
        raise JaxbakeError("the text to be matched is empty")
    views = [text_ids(tokenizer, prefix) for prefix in (teacher_prefix, student_prefix)]
    return _example(kind, *views, tail, np.ones(tail.size, bool), 1.0)


def _example(kind, teacher_prefix, student_prefix, tail, mask, weight) -> Example:
    for view, prefix in (("teacher", teacher_prefix), ("student", student_prefix)):
        if mask[0] and prefix.size == 0:
            raise JaxbakeError(
                f"the {view}'s view starts with the response itself, and this tokenizer has no BOS token to predict it "
                "from; give stimuli that are not empty"
            )
    return Example(kind, teacher_prefix, student_prefix, tail, mask, weight)


def _special_ids(tokenizer) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def end_of_turn(tokenizer) -> int | None:
    """Id of the token the chat template ends an assistant turn with; None where it has none."""
    user = [{"role": "user", "content": "Hello"}]
    lead = prompt_ids(tokenizer, user)
    full = _ids(tokenizer, render(tokenizer, [*user, {"role": "assistant", "content": "Hello"}]))
    special = _special_ids(tokenizer)
    return next((int(i) for i in full[lead.size :] if int(i) in special), None)


def _turn_end(tokenizer, messages, k, full, start, end_id, tools) -> int:
    """Where assistant turn k, which starts at `start`, ends in the ids of the whole dialogue, end-of-turn included."""
    if end_id is not None:
        ends = np.flatnonzero(full[start:] == end_id)
        if ends.size:
            return start + int(ends[0]) + 1
        raise JaxbakeError(f"turn {k} (assistant): the chat template does not end it with its end-of-turn token")
    done = _ids(tokenizer, render(tokenizer, messages[: k + 1], tools=tools))
    if not np.array_equal(full[: done.size], done):
        raise JaxbakeError(f"turn {k} (assistant): its end cannot be found, later turns change its tokens")
    return done.size


def _check_content(message: dict, k: int, rendered: str, end_text: str | None) -> None:
    """Refuses an assistant turn whose text is not rendered as written. `rendered` is the dialogue from the turn on."""
    content = message.get("content") or ""
    if end_text:
        if end_text in content:
            raise JaxbakeError(f"turn {k} (assistant): its text contains the end-of-turn token {end_text}")
        rendered = rendered[: rendered.find(end_text)]
    if content not in rendered:
        hint = "it takes white space off the ends: strip the text"
        if content.strip() not in rendered:
            hint = "as with the reasoning (<think>) of earlier turns, or text beside a tool call; leave that part out"
        raise JaxbakeError(f"turn {k} (assistant): the chat template does not keep its text as written; {hint}")
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name", "")
        if name not in rendered:
            raise JaxbakeError(f"turn {k} (assistant): the chat template leaves out its call of '{name}'")


def _dialogue(tokenizer, messages: list[dict], first: int, tools) -> tuple[np.ndarray, int, np.ndarray]:
    """Ids of a whole dialogue, where its first assistant turn from message `first` on starts, and the mask.

    Every assistant turn is located by rendering what stands before it; a template that renders that differently once
    more turns follow is found out here.
    """
    text = render(tokenizer, messages, tools=tools)
    full = _ids(tokenizer, text)
    mask = np.zeros(full.size, bool)
    end_id = end_of_turn(tokenizer)
    end_text = None if end_id is None else tokenizer.convert_ids_to_tokens(end_id)
    starts = []
    for k in range(first, len(messages)):
        if messages[k]["role"] != "assistant":
            continue
        lead_text = render(tokenizer, messages[:k], tools=tools, generate=True)
        if not text.startswith(lead_text):
            raise JaxbakeError(
                f"turn {k} (assistant): the chat template renders what stands before it differently once it is there, "
                "so what the model would have been given at that point is not in the dialogue; split it at that turn"
            )
        _check_content(messages[k], k, text[len(lead_text) :], end_text)
        lead = _ids(tokenizer, lead_text)
        if not np.array_equal(full[: lead.size], lead):
            raise JaxbakeError(
                f"turn {k} (assistant): its first characters join the tokens before it, so the model could not have "
                f"written it: {(messages[k].get('content') or '')[:20]!r}; start it with a word"
            )
        starts.append(lead.size)
        mask[lead.size : _turn_end(tokenizer, messages, k, full, lead.size, end_id, tools)] = True
    return full, starts[0], mask


def example_from_dialogue(
    tokenizer,
    teacher_prefix_messages: Messages,
    student_prefix_messages: Messages,
    tail_messages: Messages,
    tools: list | None = None,
    *,
    student_tools: list | None | object = _SAME,
    kind: str = "bake",
    weight: float = 1.0,
) -> Example:
    """The two views of a written dialogue, all of whose assistant turns are matched; user and tool turns are not.

    The tail starts with the first assistant token of `tail_messages`: what stands before it (user turns, headers) is
    counted to the prefixes and may differ between the views.

    Args:
      teacher_prefix_messages, student_prefix_messages: what each side reads first (a system prompt, a demonstration,
        nothing).
      tools, student_tools: tool descriptions for both views, unless the student is given others (or None).

    Raises JaxbakeError, naming the turn (counted from 0 over prefix and tail), where the template alters an assistant
    turn's text, where an assistant turn cannot be located, and where the two views' tails differ.
    """
    tail_messages = _checked(tail_messages)
    if not any(m["role"] == "assistant" for m in tail_messages):
        raise JaxbakeError("the dialogue has no assistant turn to be matched")
    student_tools = tools if student_tools is _SAME else student_tools
    (full_t, start_t, mask_t), (full_s, start_s, mask_s) = (
        _dialogue(tokenizer, [*_checked(prefix), *tail_messages], len(prefix), view_tools)
        for prefix, view_tools in ((teacher_prefix_messages, tools), (student_prefix_messages, student_tools))
    )
    tail, other = full_t[start_t:], full_s[start_s:]
    if not np.array_equal(tail, other) or not np.array_equal(mask_t[start_t:], mask_s[start_s:]):
        shared = min(tail.size, other.size)
        at = int(np.append(np.flatnonzero(tail[:shared] != other[:shared]), shared)[0])
        seen = [repr(tokenizer.decode(ids[max(at - 4, 0) : at + 4])) for ids in (tail, other)]
        raise JaxbakeError(
            f"the dialogue's tokens differ between teacher and student from token {at} on: {seen[0]} against "
            f"{seen[1]}; the chat template renders it differently behind these prefixes"
        )
    # Nothing after the last matched token is needed to match it.
    keep = int(np.flatnonzero(mask_t[start_t:])[-1]) + 1
    return _example(kind, full_t[:start_t], full_s[:start_s], tail[:keep], mask_t[start_t:][:keep], weight)
