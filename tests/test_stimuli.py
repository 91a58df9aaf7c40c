"""Stimuli from every source, what the model is asked to write, and the shipped pins and contexts."""

from __future__ import annotations

import json

import pytest

from jaxbake.config import GenerateConfig, StimuliConfig
from jaxbake.data.stimuli import (
    deduplicate,
    load_contexts,
    load_pins,
    load_stimuli,
    parse_generated,
    seed_requests,
    split_held_out,
)
from jaxbake.errors import JaxbakeError

ROWS = [
    {"question": "Why?", "topic": "cause"},
    {"question": " How? ", "topic": "way"},
    {"question": "why?", "topic": "x"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "s.txt").write_text("Hi there\n\n  What is up? \nHi there\n")
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "one.jsonl").write_text('{"text": "Only"}\n')
    return tmp_path


def test_sources_are_joined_without_repeats(folder):
    config = StimuliConfig(items=("", "How?"), file="s.jsonl", field="question")
    assert load_stimuli(config, folder) == ["", "How?", "Why?"]
    assert load_stimuli(StimuliConfig(file="s.txt"), folder) == ["Hi there", "What is up?"]
    assert load_stimuli(StimuliConfig(file="s.txt", limit=1), folder) == ["Hi there"]
    assert load_stimuli(StimuliConfig(file="one.jsonl"), folder) == ["Only"]
    template = StimuliConfig(file="s.jsonl", template="[{topic}] {question}")
    assert load_stimuli(template, folder) == ["[cause] Why?", "[way]  How?", "[x] why?"]
    assert load_stimuli(StimuliConfig()) == []
    assert deduplicate(["a", "b", "A ", "c", "b"]) == ["a", "b", "c"]


def test_datasets_folders(folder):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(folder / "flat")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(folder / "dict")
    (folder / "plain").mkdir()
    (folder / "plain" / "train.jsonl").write_text((folder / "s.jsonl").read_text())
    for name in ("flat", "dict", "plain"):
        assert load_stimuli(StimuliConfig(dataset=name, field="question"), folder) == ["Why?", "How?"]
    assert load_stimuli(StimuliConfig(dataset="dict", split="test", template="{topic}!"), folder) == ["way!"]
    with pytest.raises(JaxbakeError, match="no split 'tset'; did you mean 'test'"):
        load_stimuli(StimuliConfig(dataset="dict", split="tset", field="question"), folder)
    with pytest.raises(JaxbakeError, match="no field 'questoin'; did you mean 'question'"):
        load_stimuli(StimuliConfig(dataset="flat", field="questoin"), folder)
    with pytest.raises(JaxbakeError, match="columns are question, topic"):
        load_stimuli(StimuliConfig(dataset="flat"), folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(file="absent.txt"), "absent.txt: there is no such file"),
        (dict(file="empty.txt"), "empty.txt: holds no stimuli, it is empty"),
        (dict(file="s.csv"), "s.csv: stimuli files are .txt"),
        (dict(file="s.jsonl", field="qestion"), "s.jsonl line 1: there is no field 'qestion'; did you mean 'question'"),
        (dict(file="s.jsonl"), "columns are question, topic"),
        (dict(file="s.jsonl", template="{topik}"), "names 'topik'; did you mean 'topic'"),
        (dict(file="bad.jsonl", field="q"), "bad.jsonl line 2: is not JSON"),
        (dict(file="list.jsonl", field="q"), "list.jsonl line 1: must be a JSON object"),
        (dict(file="number.jsonl", field="q"), "number.jsonl line 1: field 'q' must be text, it is int"),
        (dict(file="latin.txt"), "latin.txt: must be UTF-8"),
        (dict(dataset="./absent"), "there is no folder .*absent"),
        (dict(dataset="nobody/nothing"), "stimuli.dataset 'nobody/nothing': cannot be read"),
    ],
)
def test_bad_sources(folder, config, message):
    (folder / "empty.txt").write_text("\n \n")
    (folder / "s.csv").write_text("a,b\n")
    (folder / "bad.jsonl").write_text('{"q": "a"}\n{"q": \n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "number.jsonl").write_text('{"q": 3}\n')
    (folder / "latin.txt").write_bytes("Grüße\n".encode("latin-1"))
    with pytest.raises(JaxbakeError, match=message):
        load_stimuli(StimuliConfig(**config), folder)


def test_split_held_out_is_stable():
    stimuli = [f"question {i}" for i in range(40)]
    train, held_out = split_held_out(stimuli, 0.1, seed=3)
    assert len(held_out) == 4 and sorted(train + held_out) == sorted(stimuli) and not set(train) & set(held_out)
    assert split_held_out(stimuli[::-1], 0.1, seed=3)[1] == held_out[::-1]
    assert split_held_out(stimuli, 0.1, seed=4)[1] != held_out
    assert [len(part) for part in split_held_out(["a", "b"], 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in split_held_out(["a", "b"], 0.99, seed=0)] == [1, 1]
    assert split_held_out(["a"], 0.1, seed=0) == (["a"], ["a"])
    with pytest.raises(JaxbakeError, match="there are none"):
        split_held_out([], 0.1, seed=0)


def test_seed_requests_take_styles_voices_and_passages_in_turn():
    prompt = " ".join(f"Fact number {i} is that the tower of place {i} has {i} doors." for i in range(40))
    requests = seed_requests(prompt, GenerateConfig(count=60))
    assert [style for style, _ in requests[:6]] == ["question", "task", "chat", "summary", "application", "question"]
    texts = [messages[0]["content"] for _, messages in requests]
    assert all(len(m) == 1 and m[0]["role"] == "user" and prompt in m[0]["content"] for _, m in requests)
    assert len(set(texts)) == 60
    # Every passage is turned to, and all requests share a beginning that holds the whole prompt.
    parts = [text.split('part of them: "')[1].split('"\n')[0] for text in texts]
    assert " ".join(dict.fromkeys(parts)) == prompt
    assert all(text.startswith(texts[0][: texts[0].index("</instructions>")]) for text in texts)
    assert "part of them" not in seed_requests("You are a pirate.", GenerateConfig(count=1))[0][1][0]["content"]
    assert seed_requests(prompt, GenerateConfig()) == []
    with pytest.raises(JaxbakeError, match="no style 'questoin'; did you mean 'question'"):
        seed_requests(prompt, GenerateConfig(count=1, styles=("questoin",)))


@pytest.mark.parametrize(
    ("written", "stimulus"),
    [
        ("  How are you? ", "How are you?"),
        ('"How are you?"', "How are you?"),
        ('“How are you?”', "How are you?"),
        ('Say "yes" or "no"', 'Say "yes" or "no"'),
        ('"Yes" or "no"', '"Yes" or "no"'),
        ("User: What now?", "What now?"),
        ("**User's message:** What now?", "What now?"),
        ("1. What's the plan?", "What's the plan?"),
        ("Sure, here’s a message:\n\nWhat’s the plan?", "What’s the plan?"),
        ("<think>\nhm\n</think>\n\nWhat now?", "What now?"),
        ("Here are two lines.\nBoth stay.", "Here are two lines.\nBoth stay."),
        ("Task forces are what?", "Task forces are what?"),
        ("3 apples or 4?", "3 apples or 4?"),
        ("<think>\nI wonder", None),
        ("I'm sorry, but I can't do that.", None),
        ("I can imagine a lake. Describe it.", "I can imagine a lake. Describe it."),
        ("...", None),
        ("", None),
    ],
)  # fmt: skip
def test_parse_generated(written, stimulus):
    assert parse_generated(written) == stimulus


def test_shipped_pins_and_contexts(tmp_path):
    pins, contexts = load_pins(), load_contexts()
    assert len(pins) >= 110 and len(set(pins)) == len(pins)
    assert len(contexts) >= 20 and all(3 <= len(stimuli) <= 5 for _, stimuli in contexts)
    assert len({prompt for prompt, _ in contexts}) == len(contexts)
    (tmp_path / "pins.jsonl").write_text('{"turn": "Hello"}\n')
    assert load_pins(tmp_path / "pins.jsonl") == ["Hello"]
    for row, message in [
        ({"prompt": "p", "stimuli": []}, "'stimuli' must be"),
        ({"prompt": "", "stimuli": ["a"]}, "'prompt' must be"),
        ({"prompt": "p", "stimuly": ["a"]}, "did you mean 'stimuli'"),
    ]:
        (tmp_path / "c.jsonl").write_text(json.dumps(row))
        with pytest.raises(JaxbakeError, match=message):
            load_contexts(tmp_path / "c.jsonl")
