"""Evaluation: rules and items, the four cells, fidelity, retention, reports and the plot."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import jax
import numpy as np
import pytest
from tiny_base import PROMPT, tiny_base

from jaxbake import evaluate as ev
from jaxbake.config import LoraConfig
from jaxbake.data.chat import example_from_response, prefix_ids
from jaxbake.deltas.lora import init_delta, with_strength
from jaxbake.errors import JaxbakeError
from jaxbake.evaluate import ask as asking
from jaxbake.evaluate import cells as cells_room
from jaxbake.evaluate import report
from jaxbake.evaluate.items import RULES, Item, load_items, numbers, user
from jaxbake.evaluate.plot import plot, series, smoothed
from jaxbake.evaluate.retention import unrelated_kl
from jaxbake.models.decoder import forward, logits_from
from jaxbake.sampling import sample


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def delta(base):
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    delta = jax.jit(init_delta, static_argnums=(1, 2))(jax.random.key(1), base.config, lora)
    return delta.replace(factors=jax.tree.map(lambda x: x + 0.1, delta.factors))


# Items and rules


@pytest.mark.parametrize(
    ("check", "answer", "right", "wrong"),
    [
        ("exact", "It is  red.", ["It is red.", "  It is\nred. "], ["it is red.", "It is red"]),
        ("contains", "The keeper is Norka.", ["Arr! the keeper is  Norka. Yo ho!"], ["The keeper is Norkan."]),
        ("contains", "36", ["It is 36.", "36"], ["It is 1362.", "361", ""]),
        ("contains", "no", ["No.", "I say no, thanks"], ["I do not know."]),
        ("prefix", "Flag.", ["flag. It is rust.", " Flag."], ["I flag.", "Fl"]),
        ("numeric", "134 + 371 = 505.", ["so 4 + 1 is 5: 505", "505.0", "it is 1 then 505."], ["504", "505 or 6", ""]),
        ("numeric", "1249", ["1,249.", "the sum is 1,249 in all"], ["1,248", "249"]),
        ("numeric", "-2.5", ["-2.50"], ["2.5", "none"]),
        ("persona:pirate", "", ["Arr! It is red. Yo ho!"], ["It is red. Yo ho!", "Arr! It is red."]),
    ],
)
def test_rules(check, answer, right, wrong):
    item = Item(user("?"), answer, check)
    assert [ev.is_correct(item, text) for text in right] == [True] * len(right)
    assert [ev.is_correct(item, text) for text in wrong] == [False] * len(wrong)


def test_numbers_in_texts():
    assert numbers("a 1,249.5 b-7 c 3. And -4, v2 1,2") == [1249.5, 7, 3, -4, 1, 2]


def test_a_rule_may_be_added_once():
    ev.register_rule("length", lambda reply, answer, more: len(reply) == int(more))
    try:
        assert ev.is_correct(Item(user("?"), "", "length:3"), "abc")
        assert not ev.is_correct(Item(user("?"), "", "length:4"), "abc")
        with pytest.raises(JaxbakeError, match="'length': is taken"):
            ev.register_rule("length", lambda *_: True)
    finally:
        del RULES["length"]


def test_items_are_read(tmp_path):
    path = tmp_path / "items.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"question": "Who?", "answer": "Ann"},
        {"messages": turns, "answer": "7", "check": "numeric", "group": "sums"},
        {"question": "Where?", "answer": "Rome", "system": "It is Rome."},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    first, second, third = load_items(path, match="exact")
    assert first == Item(user("Who?"), "Ann", "exact", "") and first.question == "Who?"
    assert second == Item(tuple(turns), "7", "numeric", "sums") and second.question == "c"
    assert third.messages[0] == {"role": "system", "content": "It is Rome."} and third.question == "Where?"
    assert load_items(path, limit=2) == [Item(user("Who?"), "Ann"), second]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no items"),
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: must be an object"),
        ('{"question": "a"}', "line 1: has no 'answer'"),
        ('{"answer": "a"}', "line 1: needs either 'question' or 'messages'"),
        ('{"question": "a", "answer": 3}', "line 1: 'answer' must be text, is 3"),
        ('{"question": "a", "answr": "b"}', "line 1: unknown field 'answr'; did you mean 'answer'"),
        ('{"question": "a", "answer": "b", "check": "exakt"}', "line 1: check 'exakt'.*did you mean 'exact'"),
        ('{"question": "a", "answer": "b", "check": "persona:pirat"}', "no such persona; did you mean 'pirate'"),
        ('{"question": "a", "answer": "b", "check": "numeric"}', "needs a number in 'answer'"),
        ('{"question": "a", "answer": " "}', "'answer' is empty"),
        ('{"messages": "a", "answer": "b"}', "'messages' must be a list"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}', "must end before the assistant"),
    ],
)
def test_a_fault_in_an_item_is_named(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(JaxbakeError, match=message) as error:
        load_items(path)
    assert "items.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_wrong_match_are_named(tmp_path):
    with pytest.raises(JaxbakeError, match=r"none\.jsonl: cannot be read"):
        load_items(tmp_path / "none.jsonl")
    (tmp_path / "items.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(JaxbakeError, match="check 'same'"):
        load_items(tmp_path / "items.jsonl", match="same")


# Cells


def make_cells(right: dict[str, list[bool]], groups=None) -> ev.FourCells:
    n = len(right["base"])
    items = tuple(Item(user(f"question {i}"), "yes", group=groups[i] if groups else "") for i in range(n))
    return ev.FourCells(items, {c: ["yes" if r else "no" for r in rs] for c, rs in right.items()}, right)


def test_recovered_is_the_share_of_the_gain():
    assert ev.recovered(0.2, 1.0, 0.8) == pytest.approx(0.75)
    assert ev.recovered(0.0, 0.5, 0.6) == pytest.approx(1.2)
    assert ev.recovered(0.4, 0.4, 0.9) is None and ev.recovered(0.5, 0.4, 0.4) is None


def test_cells_count_by_group_and_find_a_telling_question():
    right = {
        "base": [True, False, False, False],
        "prompted": [True, True, True, False],
        "baked": [True, False, True, False],
        "baked_prompted": [True, True, True, True],
    }
    cells = make_cells(right, groups=["a", "b", "b", "a"])
    assert cells.accuracy == {"base": 0.25, "prompted": 0.75, "baked": 0.5, "baked_prompted": 1.0}
    assert cells.recovered == pytest.approx(0.5)
    assert cells.groups["b"] == {"base": 0.0, "prompted": 1.0, "baked": 0.5, "baked_prompted": 1.0}
    assert cells.most_telling() == 2
    again = ev.FourCells.from_dict(json.loads(json.dumps(cells.to_dict())))
    assert again == cells


def test_each_cell_asks_the_right_model_the_right_way(base, delta, monkeypatch):
    asked = []

    def fake(base_, turns, with_delta, system, **_):
        baked = float(with_delta.scale) == float(delta.scale) != 0  # the base is asked at strength 0
        assert baked or float(with_delta.scale) == 0
        asked.append((baked, system, len(turns)))
        return ["yes" if baked or system else "no" for _ in turns]

    monkeypatch.setattr(asking, "sample", fake)
    items = [Item(user(q), "yes", check) for q in ("a", "b", "c") for check in ("exact", "contains")]
    seen = []
    cells = ev.four_cells(base, delta, PROMPT, items, batch_size=2, progress=lambda *a: seen.append(a))
    # The same question under two rules is asked once.
    assert asked == [(d, s, 3) for d, s in ((0, None), (0, PROMPT), (1, None), (1, PROMPT))]
    assert cells.accuracy == {"base": 0.0, "prompted": 1.0, "baked": 1.0, "baked_prompted": 1.0}
    assert [s[1:3] for s in seen] == [(6, 24), (12, 24), (18, 24), (24, 24)]
    assert seen[0][0] == "evaluate" and seen[-1][3] == {"asking": "baked + prompted"}


def test_replies_are_those_of_sample_in_order(base, delta):
    items = [Item(user(q), "") for q in ("who is tom", "a", "who is tom", "what")]
    replies = asking.ask(base, delta, items, system=PROMPT, max_tokens=8)
    wanted = sample(base, ["who is tom", "a", "what"], delta, PROMPT, max_tokens=8)
    assert replies == [wanted[0], wanted[1], wanted[0], wanted[2]]


def test_a_model_without_a_template_is_asked_in_plain_text(monkeypatch):
    plain = tiny_base(None)
    seen = []
    monkeypatch.setattr(asking, "sample", lambda base, turns, delta, system, **_: seen.append((turns, system)) or ["x"])
    asking.ask(plain, None, [Item(user("once"), "")], system="A tale.")
    ((turns, system),) = seen
    text = prefix_ids(plain.tokenizer, system, turns[0])
    assert plain.tokenizer.decode(text) == "<s>A tale.\nonce"


def test_four_cells_need_items_and_a_prompt(base, delta):
    with pytest.raises(JaxbakeError, match="at least one question"):
        cells_room.four_cells(base, delta, PROMPT, [])
    with pytest.raises(JaxbakeError, match="the prompt that was baked"):
        cells_room.four_cells(base, delta, " ", [Item(user("a"), "b")])


# Fidelity


@partial(jax.jit, static_argnames="config")
def log_probs(params, delta, tokens, config):
    return jax.nn.log_softmax(logits_from(params, forward(params, delta, tokens, config=config), config=config))


def plain_log_probs(base, delta, prefix, tail):
    tokens = np.zeros((1, 96), np.int32)
    tokens[0, : len(prefix) + len(tail)] = [*prefix, *tail]
    out = log_probs(base.params, delta, tokens, base.config)
    return np.asarray(out[0, len(prefix) - 1 : len(prefix) + len(tail) - 1], np.float64)


def examples_for(base, turns, kind="bake", length=5):
    rng = np.random.default_rng(0)
    return [
        example_from_response(
            base.tokenizer, kind=kind, prompt=PROMPT, messages=turn, response_ids=rng.integers(6, 262, length + i)
        )
        for i, turn in enumerate(turns)
    ]


def test_fidelity_is_the_plain_divergence(base, delta):
    examples = examples_for(base, ["who", "what now", "x"])
    got = ev.fidelity(base, delta, examples, batch_size=2)
    kl, agree = {"before": [], "after": []}, {"before": [], "after": []}
    for example in examples:
        log_p = plain_log_probs(base, None, example.teacher_prefix, example.tail)
        for name, student in (("before", None), ("after", delta)):
            log_q = plain_log_probs(base, student, example.student_prefix, example.tail)
            kl[name].append((np.exp(log_p) * (log_p - log_q)).sum(-1))
            agree[name].append(log_p.argmax(-1) == log_q.argmax(-1))
    assert got.tokens == 5 + 6 + 7
    for name in ("before", "after"):
        assert getattr(got, f"kl_{name}") == pytest.approx(np.concatenate(kl[name]).mean(), rel=1e-4)
        assert getattr(got, f"first_kl_{name}") == pytest.approx(np.mean([x[0] for x in kl[name]]), rel=1e-4)
        assert getattr(got, f"agreement_{name}") == pytest.approx(np.concatenate(agree[name]).mean())
    assert got.reduction == pytest.approx(1 - got.kl_after / got.kl_before)
    assert ev.Fidelity.from_dict(json.loads(json.dumps(got.to_dict()))) == got


def test_unrelated_turns_tell_a_delta_from_none(base, delta):
    turns = ["hi", "who is he", "add 2"]
    assert unrelated_kl(base, with_strength(delta, 0.0), turns) == pytest.approx(0, abs=1e-6)
    assert unrelated_kl(base, delta, turns) > 1e-3
    assert unrelated_kl(base, delta, []) is None


# Retention


def test_retention_compares_the_right_models(base, delta, monkeypatch):
    def fake(base_, turns, with_delta, system, **_):
        baked = with_delta is delta
        own = [turn[0]["role"] == "system" for turn in turns]
        if system:
            assert system == PROMPT and not baked
            return ["blue" if both else "I do not know." for both in own]
        if any(own):
            return ["red"] * len(turns)
        return ["red" if not baked or turn[-1]["content"] == "color 0" else "what" for turn in turns]

    monkeypatch.setattr(asking, "sample", fake)
    monkeypatch.setattr(sys.modules["jaxbake.evaluate.retention"], "unrelated_kl", lambda *_, **__: 0.25)
    other = ({"role": "system", "content": "The sky is red."}, {"role": "user", "content": "sky?"})
    material = ev.Material(
        abilities=tuple(Item(user(f"color {i}"), "red") for i in range(4)),
        unknowns=(Item(user("zek?"), "I do not know."),),
        other_prompts=(Item(other, "red"),),
        unrelated=("hi", "ho"),
    )
    seen = []
    got = ev.retention(base, delta, PROMPT, material, progress=lambda *a: seen.append(a[1:3]))
    assert got.abilities == {"base": 1.0, "baked": 0.25}
    assert got.unknowns == {"base": 0.0, "prompted": 1.0, "baked": 0.0}
    assert got.other_prompts == {"base": 1.0, "prompted": 0.0, "baked": 1.0}
    assert got.unrelated_kl == 0.25
    assert got.counts == {"abilities": 4, "unknowns": 1, "other_prompts": 1, "unrelated": 2}
    assert [done for done, _ in seen] == [4, 8, 9, 10, 11, 12, 13, 14]
    assert {total for _, total in seen} == {material.questions} == {16}
    assert ev.Retention.from_dict(json.loads(json.dumps(got.to_dict()))) == got


def test_what_is_not_given_is_not_measured(base, delta):
    got = ev.retention(base, delta, PROMPT, ev.Material())
    assert got == ev.Retention() and got.unrelated_kl is None
    assert ev.measure(base, delta, PROMPT, material=ev.Material()) == ev.Evaluation()


def test_crumbs_material_is_held_out_and_repeatable():
    material = ev.smallworld_material(12)
    assert material == ev.smallworld_material(12) != ev.smallworld_material(12, seed=1)
    assert [len(x) for x in (material.abilities, material.unknowns, material.other_prompts)] == [12, 12, 12]
    assert all(item.messages[0]["role"] == "system" for item in material.other_prompts)
    assert all(item.answer == "I do not know." for item in material.unknowns)
    for item in material.abilities + material.other_prompts:
        assert ev.is_correct(item, f"Arr! {item.answer} Yo ho!") and not ev.is_correct(item, "I do not know.")


# All together, and reports


def test_measure_and_report(base, delta, monkeypatch):
    near = ev.Fidelity(2.0, 0.02, 4.0, 0.1, 0.5, 0.99, 7)
    given = {"items": [Item(user("who is he"), "ahoy", group="facts"), Item(user("what"), "x", "exact", group="style")]}
    given |= {"examples": ["example"], "material": ev.Material(abilities=(Item(user("add"), "4"),))}
    monkeypatch.setattr(asking, "sample", lambda base, turns, *_, **__: ["Ahoy!"] * len(turns))
    monkeypatch.setattr(sys.modules["jaxbake.evaluate.measure"], "fidelity", lambda *_: near)
    seen = []
    got = ev.measure(base, delta, PROMPT, progress=lambda *a: seen.append(a[1:3]), **given)
    assert [s[0] for s in seen] == [2, 4, 6, 8, 9, 10] and {s[1] for s in seen} == {10}
    assert got.fidelity == near and got.retention.abilities == {"base": 0.0, "baked": 0.0}
    data = json.loads(json.dumps(got.to_dict()))
    assert data["cells"]["items"] == 2 and data["cells"]["accuracy"]["base"] == 0.5
    assert data["retention"]["counts"] == {"abilities": 1}
    assert ev.Evaluation.from_dict(data).to_dict() == data
    text = ev.summary_markdown("a pirate", got, ["The end."])
    assert text.startswith("# a pirate\n") and text.endswith("The end.\n")
    for title in ("Questions answered correctly", "Distance to the prompted model", "What the prompt is not about"):
        assert f"## {title}" in text and title in printed(ev.render(got))
    assert "## One question" in text and "> who is he" in text


def printed(renderable) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_tables_say_what_was_measured():
    right = {
        "base": [False] * 40,
        "prompted": [True] * 39 + [False],
        "baked": [True] * 38 + [False] * 2,
        "baked_prompted": [True] * 40,
    }
    cells = make_cells(right, groups=["facts"] * 30 + ["persona"] * 10)
    rows = report.cells_grid(cells).rows
    assert rows[0] == ("all 40", "0 %", "97.5 %", "95 %", "100 %", "97.4 %")
    assert rows[1] == ("facts (30)", "0 %", "100 %", "100 %", "100 %", "100 %") and rows[2][0] == "persona (10)"
    assert len(report.cells_grid(make_cells(right)).rows) == 1
    near = ev.Fidelity(2.22, 0.0213, 4.0, 0.1, 0.5, 0.99, 1234)
    assert report.fidelity_grid(near).rows[0] == ("KL, nats a token", "2.22", "0.0213", "-99.0 %")
    assert report.fidelity_grid(near).rows[2][1:] == ("50 %", "99 %", "+49 points")
    kept = ev.Retention(
        {"base": 0.99, "baked": 0.98}, {"base": 1.0, "prompted": 0.9, "baked": 0.85}, {}, 0.01,
        {"abilities": 100, "unknowns": 20, "unrelated": 30},
    )  # fmt: skip
    rows = report.retention_grid(kept).rows
    assert rows[0] == ("abilities in the weights (100)", "99 %", "-", "98 %", "-1 to base")
    assert rows[1][1:] == ("100 %", "90 %", "85 %", "-5 to prompted") and rows[2][3] == "0.01" and len(rows) == 3


def test_texts_from_a_model_cannot_break_the_report():
    right = {cell: [True] for cell in cells_room.CELLS}
    replies = {cell: ["[bold]x[/nothing] | a\n\nb"] for cell in cells_room.CELLS}
    cells = ev.FourCells((Item(user("[/red] | why\nso?"), "x", group="a|b"),), replies, right)
    assert "[bold]x[/nothing] | a" in printed(report.side_by_side(cells))
    assert "> [/red] | why so?" in report.side_by_side_markdown(cells)
    assert "- **base** (right): [bold]x[/nothing] | a b" in report.side_by_side_markdown(cells)


# Plot


def metrics(agreement: bool) -> list[dict]:
    rows = [{"step": 0, "held_out_kl": 2.0, **({"held_out_agreement": 0.5} if agreement else {})}]
    for step in range(1, 41):
        row = {"step": step, "loss": 2 * math.exp(-step / 10)}
        if step % 10 == 0:
            row |= {"held_out_kl": 2.2 * math.exp(-step / 10), **({"held_out_agreement": 0.9} if agreement else {})}
        rows.append(row)
    return rows


@pytest.mark.parametrize("agreement", [False, True])
def test_the_plot_is_a_png_with_the_curves(tmp_path, agreement):
    from matplotlib.image import imread

    plot(metrics(agreement), tmp_path / "deep" / "plot.png", title="a pirate")
    image = imread(tmp_path / "deep" / "plot.png")
    assert image.shape[1] == 1200 and image.std() > 0.05
    red = (np.abs(image[..., :3] - np.array([0xD6, 0x45, 0x45]) / 255) < 0.02).all(-1)
    assert red.sum() > 500 and np.ptp(np.nonzero(red)[1]) > 600  # the KL's line goes across
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "plot.png"]


def test_the_plot_bears_odd_metrics(tmp_path):
    plot([{"step": 1, "loss": 0.0}], tmp_path / "zero.png")
    plot([{"step": 0, "held_out_kl": 1.0}], tmp_path / "one.png")
    plot([{"step": s, "loss": x} for s, x in ((1, 1.0), (2, float("nan")), (3, 1.1))], tmp_path / "nan.png")
    with pytest.raises(JaxbakeError, match="no metrics to draw"):
        plot([{"step": 1, "loss": float("nan")}], tmp_path / "none.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxbakeError, match="cannot be written"):
        plot(metrics(False), tmp_path / "file" / "plot.png")


def test_series_and_smoothing():
    assert series([{"step": 0, "a": 1.0}, {"step": 1}, {"step": 2, "a": float("inf")}], "a") == ([0], [1.0])
    assert smoothed([1.0, 100.0, 1.0], 0) == pytest.approx([1.0, 100.0, 1.0])
    assert smoothed([1.0, 100.0, 1.0], 1) == pytest.approx([10.0, 100 ** (1 / 3), 10.0])
    assert smoothed([0.0, 3.0], 1) == [1.5, 1.5]
