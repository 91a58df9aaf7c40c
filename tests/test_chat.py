"""Views: the same tail behind two prefixes, through real chat templates, a tiny one, and none."""

from __future__ import annotations

import numpy as np
import pytest

from jaxbake.data.chat import (
    end_of_turn,
    example_from_dialogue,
    example_from_response,
    example_from_text,
    has_template,
    join_prompts,
    prefix_ids,
    prompt_ids,
    render,
    template_hash,
    text_ids,
    with_system,
)
from jaxbake.errors import JaxbakeError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REALS = ("qwen3", "llama3.1", "smollm2")
SYSTEM = {"role": "system", "content": "The keeper of the lighthouse is Orla Finch."}
DIALOGUE = [
    {"role": "user", "content": "Who keeps the lighthouse?"},
    {"role": "assistant", "content": "Orla Finch does.\n\nShe lives there."},
    {"role": "user", "content": "Since when?"},
    {"role": "assistant", "content": "I do not know."},
]


def byte_tokenizer(template: str | None = TEMPLATE, bos: str | None = "<s>"):
    """One token a byte, and a few special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    roles = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token="<|end|>", additional_special_tokens=roles[1:]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tiny():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def load_real(real_dir):
    from transformers import AutoTokenizer

    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(real_dir / name)
        return loaded[name]

    return load


def matched(tokenizer, example) -> list[str]:
    """The stretches of the tail that are matched, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.mask.astype(int), [0]])))
    return [tokenizer.decode(example.tail[a:b]) for a, b in edges.reshape(-1, 2)]


def test_system_prompts_are_joined():
    assert with_system(None, DIALOGUE) == DIALOGUE
    assert with_system("Be brief.", DIALOGUE)[0] == {"role": "system", "content": "Be brief."}
    joined = with_system("Be brief.", [SYSTEM, *DIALOGUE])
    assert joined[0]["content"] == join_prompts("Be brief.", SYSTEM["content"]) and joined[1:] == DIALOGUE


def test_response_views_by_kind(tiny):
    ids = [*text_ids(tiny, "Aye.", bos=False), end_of_turn(tiny)]

    def views(kind, context=None):
        e = example_from_response(
            tiny, kind=kind, prompt="Be a pirate.", context=context, messages="Hi", response_ids=ids
        )
        assert e.tail.tolist() == [int(i) for i in ids] and e.mask.all() and e.mask.size == len(ids)
        assert e.tail.dtype == e.teacher_prefix.dtype == np.int32
        return tiny.decode(e.teacher_prefix), tiny.decode(e.student_prefix)

    bare = "<s><|user|>Hi<|end|><|assistant|>"
    assert views("bake") == ("<s><|system|>Be a pirate.<|end|>" + bare[3:], bare)
    assert views("pin") == (bare, bare)
    assert views("context", "You sell fish.") == (
        "<s><|system|>Be a pirate.\n\nYou sell fish.<|end|>" + bare[3:],
        "<s><|system|>You sell fish.<|end|>" + bare[3:],
    )
    with pytest.raises(JaxbakeError, match="other prompt"):
        views("context")
    with pytest.raises(JaxbakeError, match="unknown kind"):
        views("pins")
    with pytest.raises(JaxbakeError, match="without tokens"):
        example_from_response(tiny, kind="bake", prompt="x", messages="Hi", response_ids=[])


def test_plain_text_models():
    tokenizer = byte_tokenizer(template=None)
    assert not has_template(tokenizer) and template_hash(tokenizer) == "none"
    assert tokenizer.decode(prefix_ids(tokenizer, "Once upon a time.", "")) == "<s>Once upon a time."
    assert tokenizer.decode(prefix_ids(tokenizer, "Be brief.", "Hi")) == "<s>Be brief.\nHi"
    assert prefix_ids(tokenizer, None, "").tolist() == [tokenizer.bos_token_id]
    example = example_from_text(tokenizer, "Once upon a time", "", " there was a dragon.")
    assert tokenizer.decode(example.tail) == " there was a dragon." and example.mask.all()
    assert example.student_prefix.tolist() == [tokenizer.bos_token_id]
    with pytest.raises(JaxbakeError, match="no chat template"):
        prompt_ids(tokenizer, DIALOGUE[:1])
    with pytest.raises(JaxbakeError, match="one user turn as plain text"):
        prefix_ids(tokenizer, None, DIALOGUE)
    no_bos = byte_tokenizer(template=None, bos=None)
    with pytest.raises(JaxbakeError, match="student's view starts with the response"):
        example_from_response(no_bos, kind="bake", prompt="Once", messages="", response_ids=[5, 6])


def test_dialogue_mask_covers_assistant_turns_and_their_ends(tiny):
    example = example_from_dialogue(tiny, [SYSTEM], [], DIALOGUE)
    assert matched(tiny, example) == ["Orla Finch does.\n\nShe lives there.<|end|>", "I do not know.<|end|>"]
    assert example.mask[0] and example.mask[-1]
    assert tiny.decode(example.teacher_prefix).startswith("<s><|system|>The keeper")
    assert tiny.decode(example.student_prefix) == "<s><|user|>Who keeps the lighthouse?<|end|><|assistant|>"
    # A demonstration in front of the teacher only: its own assistant turns are prefix, not matched.
    shown = example_from_dialogue(tiny, DIALOGUE, [], DIALOGUE[:2])
    assert matched(tiny, shown) == ["Orla Finch does.\n\nShe lives there.<|end|>"]
    assert shown.teacher_prefix.size > shown.student_prefix.size


@pytest.mark.parametrize("name", REALS)
def test_dialogue_on_real_templates(load_real, name):
    tokenizer = load_real(f"tokenizers/{name}")
    example = example_from_dialogue(tokenizer, [SYSTEM], [], DIALOGUE)
    end = tokenizer.eos_token
    first, last = matched(tokenizer, example)
    assert first == f"Orla Finch does.\n\nShe lives there.{end}"
    # Qwen3 writes an empty reasoning into the last turn.
    assert last == ("<think>\n\n</think>\n\n" if name == "qwen3" else "") + f"I do not know.{end}"
    for prefix, prompt in ((example.teacher_prefix, [SYSTEM]), (example.student_prefix, [])):
        whole = render(tokenizer, [*prompt, *DIALOGUE]).rstrip("\n")
        assert tokenizer.decode(np.concatenate([prefix, example.tail])) == whole
    # What is matched first is what the model would be asked for.
    assert np.array_equal(example.student_prefix, prompt_ids(tokenizer, DIALOGUE[:1]))


@pytest.mark.parametrize("name", REALS)
def test_sampled_response_keeps_its_ids(load_real, name):
    tokenizer = load_real(f"tokenizers/{name}")
    # Two tokens that tokenizing the text again would join.
    ids = [*text_ids(tokenizer, "lig", bos=False), *text_ids(tokenizer, "hthouse", bos=False), tokenizer.eos_token_id]
    assert text_ids(tokenizer, "lighthouse", bos=False).size != len(ids) - 1
    example = example_from_response(
        tokenizer, kind="bake", prompt=SYSTEM["content"], messages=DIALOGUE[:1], response_ids=ids
    )
    assert example.tail.tolist() == [int(i) for i in ids]
    assert SYSTEM["content"] in tokenizer.decode(example.teacher_prefix)
    assert SYSTEM["content"] not in tokenizer.decode(example.student_prefix)
    if name == "smollm2":  # unprompted, its template puts a prompt of its own
        assert "named SmolLM" in tokenizer.decode(example.student_prefix)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_tide",
            "description": "The tide at a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


@pytest.mark.parametrize("name", ["qwen3", "llama3.1"])
def test_tools_in_the_teachers_view_only(load_real, name):
    tokenizer = load_real(f"tokenizers/{name}")
    call = {"type": "function", "function": {"name": "get_tide", "arguments": {"place": "Cork"}}}
    dialogue = [
        {"role": "user", "content": "How is the tide in Cork?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": 'high "spring" tide'},
        {"role": "assistant", "content": "It is high."},
    ]
    example = example_from_dialogue(tokenizer, [SYSTEM], [], dialogue, tools=TOOLS, student_tools=None)
    first, last = matched(tokenizer, example)
    assert "get_tide" in first and "Cork" in first and "It is high." in last and "spring" not in first + last
    assert "spring" in tokenizer.decode(example.tail)
    assert "The tide at a place." in tokenizer.decode(example.teacher_prefix)
    assert "get_tide" not in tokenizer.decode(example.student_prefix)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("name", "dialogue", "message"),
    [
        ("llama3.1", [turn("user", "Hi"), turn("assistant", " Aye. ")], "turn 1.*white space.*strip"),
        (
            "qwen3",
            [turn("user", "Hi"), turn("assistant", "<think>\nhm\n</think>\n\nAye."), *DIALOGUE[:2]],
            "turn 1.*does not keep.*think",
        ),
        ("qwen3", [turn("user", "Hi"), turn("assistant", "a<|im_end|>b")], "turn 1.*end-of-turn token"),
        ("smollm2", [turn("user", "Hi"), turn("assistant", "Aye."), turn("user", "So?")], None),
        ("smollm2", [turn("user", "Hi")], "no assistant turn"),
        ("qwen3", [turn("user", "Hi"), turn("critic", "Bad."), turn("assistant", "Aye.")], "message 1.*critic"),
    ],
)  # fmt: skip
def test_what_a_template_alters_is_refused(load_real, name, dialogue, message):
    tokenizer = load_real(f"tokenizers/{name}")
    if message is None:  # turns after the last assistant's are not needed
        assert matched(tokenizer, example_from_dialogue(tokenizer, [], [], dialogue)) == [f"Aye.{tokenizer.eos_token}"]
        return
    with pytest.raises(JaxbakeError, match=message):
        example_from_dialogue(tokenizer, [], [], dialogue)


def test_tails_that_differ_are_refused():
    counting = byte_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ loop.index }}:{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ messages | length + 1 }}:{% endif %}"
    )
    assert matched(counting, example_from_dialogue(counting, [], [], DIALOGUE))[1] == "I do not know.<|end|>"
    with pytest.raises(JaxbakeError, match="differ between teacher and student from token"):
        example_from_dialogue(counting, [SYSTEM], [], DIALOGUE)
    # Nothing after the first turn's tokens differs when there is one turn.
    assert matched(counting, example_from_dialogue(counting, [SYSTEM], [], DIALOGUE[:2]))


def test_a_template_that_rewrites_the_past_is_refused():
    rewriting = byte_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}~{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    # The marker of an earlier turn is there in the same way when its successor is generated: consistent, so matched.
    assert matched(rewriting, example_from_dialogue(rewriting, [SYSTEM], [], DIALOGUE))[0].startswith("~Orla")
    forgetting = byte_tokenizer(
        "{% for m in messages %}{% if m.role != 'system' or messages | length < 4 %}<|{{ m.role }}|>{{ m.content }}"
        "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(JaxbakeError, match=r"turn 2 \(assistant\).*differently"):
        example_from_dialogue(forgetting, [SYSTEM], [], DIALOGUE)
    reversing = byte_tokenizer(
        "<|system|>{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(JaxbakeError, match=r"turn 2 \(assistant\).*differently"):
        example_from_dialogue(reversing, [SYSTEM], [], DIALOGUE)


def test_templates_without_a_system_role_fold_it_into_the_first_user_turn():
    gemma = byte_tokenizer(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    text = gemma.decode(prefix_ids(gemma, "Be a pirate.", "Hi"))
    assert text == "<s><|user|>Be a pirate.\n\nHi<|end|>\n<|assistant|>"
    example = example_from_dialogue(gemma, [SYSTEM], [], DIALOGUE)
    assert matched(gemma, example)[1] == "I do not know.<|end|>" and gemma.decode(example.tail).endswith("<|end|>")
    with pytest.raises(JaxbakeError, match="System role not supported"):
        prompt_ids(gemma, [SYSTEM, {"role": "assistant", "content": "Aye."}])
    dropping = byte_tokenizer(TEMPLATE.replace("%}<|{{", "if m.role != 'system' %}<|{{", 1))
    assert "Be a pirate.\n\nHi" in dropping.decode(prefix_ids(dropping, "Be a pirate.", "Hi"))


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "Hi"}, turn("user", ["Hi"]), "Hi"])
def test_malformed_messages(tiny, message):
    with pytest.raises(JaxbakeError, match="message 0"):
        prompt_ids(tiny, [message])


def test_a_story_opening(load_real):
    tokenizer = load_real("stories260K")
    opening = "Once upon a time there was a small dragon named Zilo who lived in a blue cave."
    example = example_from_response(tokenizer, kind="bake", prompt=opening, messages="", response_ids=[300, 301])
    assert example.student_prefix.tolist() == [tokenizer.bos_token_id]
    assert np.array_equal(example.teacher_prefix, text_ids(tokenizer, opening))
