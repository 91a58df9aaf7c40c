"""The small world, crumb's tokenizer and template, its packing, scoring and training."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbake.errors import JaxbakeError
from jaxbake.models import checkpoint, families
from jaxbake.models.decoder import forward
from jaxbake.models.spec import ModelConfig, init_params
from jaxbake.smallworld import CRUMB, export, fast, items, packing, score, train, wording, words
from jaxbake.smallworld.blocks import draw_facts
from jaxbake.smallworld.curriculum import STAGES, draw_dialogue
from jaxbake.smallworld.manner import PERSONAS, QA, Manner, draw_manner
from jaxbake.smallworld.scene import prompt_text
from jaxbake.smallworld.tokenizer import CHAT_TEMPLATE, corpus, train_tokenizer
from jaxbake.smallworld.wording import Source
from jaxbake.smallworld.world import FAMILIES, make_dialogue


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(CRUMB / "tokenizer.json"))


@pytest.fixture(scope="module")
def hf_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CRUMB)


@pytest.fixture(scope="module")
def small() -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=1024, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_positions=1024, tie_embeddings=True, norm_eps=1e-5, init_range=0.1,
    )  # fmt: skip


def test_a_seed_gives_the_same_dialogues():
    first, again, other = ([draw_dialogue(random.Random(s), 2) for _ in range(1)] for s in (7, 7, 8))
    assert first == again != other
    rng_a, rng_b = random.Random(3), random.Random(3)
    assert [draw_dialogue(rng_a, 2) for _ in range(50)] == [draw_dialogue(rng_b, 2) for _ in range(50)]


def test_a_tenth_of_names_and_a_sixth_of_wordings_are_held_out():
    assert not set(words.TRAIN_NAMES) & set(words.HELD_OUT_NAMES)
    assert len(words.NAMES) == len(set(words.NAMES)) == 2304
    assert 0.07 < len(words.HELD_OUT_NAMES) / 2304 < 0.13
    every = [(o, f, c) for o in wording.OPENERS for f in wording.DIRECT for c in wording.CLOSERS]
    assert 0.12 < np.mean([wording.is_held_out_wording(*w) for w in every]) < 0.22


def test_training_never_shows_a_held_out_name_or_wording():
    held = set(words.HELD_OUT_NAMES)
    rng = random.Random(0)
    for stage in range(len(STAGES)):
        for _ in range(300):
            text = " ".join(m["content"] for m in draw_dialogue(rng, stage).messages)
            assert not held & set("".join(c if c.isalpha() else " " for c in text).split())
    for held_out in (False, True):
        source = Source(random.Random(1), held_out)
        assert all(wording.is_held_out_wording(*source.wording(wording.DIRECT)) == held_out for _ in range(300))


def test_evaluation_shows_only_held_out_names():
    trained = set(words.TRAIN_NAMES) - {"Hello"}  # a name, and a greeting
    for family in ("facts_7_12", "joined", "persona_facts"):
        for item in items.evaluation_items(family, 20):
            text = " ".join(m["content"] for m in item.messages)
            assert not trained & set("".join(c if c.isalpha() else " " for c in text).split())


@pytest.mark.parametrize("family", items.EVAL_FAMILIES)
def test_every_family_gives_items_whose_answers_pass(family):
    found = items.evaluation_items(family, 8, seed=2)
    assert found == items.evaluation_items(family, 8, seed=2) != items.evaluation_items(family, 8, seed=3)
    for item in found:
        assert item.messages[-1]["role"] == ("tool" if family == "tool_answer" else "user")
        assert items.is_correct(item, f" {item.answer}\n")
        assert not items.is_correct(item, "No idea at all.")
        assert all(m["content"].strip() for m in item.messages)


def test_a_manner_leaves_its_marks_around_the_plain_answer():
    rng = random.Random(0)
    for kind in ("persona", "prefix", "suffix", "two"):
        for _ in range(20):
            manner = draw_manner(Source(rng), kind)
            answer = make_dialogue(rng, "ability").messages[-1]["content"]
            said = manner.say(QA("?", answer, answer))
            before, after = manner.marks
            assert said == before + answer + after and answer in said
            assert not manner.persona or items.has_persona(said, manner.persona) or manner.prefix or manner.suffix
    assert not items.has_persona("The color of Foltan is green.", "pirate")
    assert all(items.has_persona(a + "Yes." + b, p) for p, (a, b) in PERSONAS.items())


def test_facts_can_be_read_from_their_prompt():
    for seed in range(50):
        source = Source(random.Random(seed))
        block = draw_facts(source, 12)
        assert len({(f.key, f.relation) for f in block.facts}) == 12
        text = prompt_text(source, Manner(), [block])
        assert all(f.key in text and f.value.lower() in text.lower() for f in block.facts)


def test_the_tokenizer_gives_every_text_back(hf_tokenizer):
    assert hf_tokenizer.chat_template == CHAT_TEMPLATE
    texts = [
        "The keeper of Vorlan is 47.",
        " two  spaces ",
        "naïve ☂ 你好",
        "a\n- b\n\nc",
        "",
        "Arr! 3 + 4 = 7. Yo ho!",
    ]
    for text in texts:
        assert hf_tokenizer.decode(hf_tokenizer(text)["input_ids"]) == text
    assert len(hf_tokenizer) == 1024
    assert hf_tokenizer.convert_ids_to_tokens(hf_tokenizer("385")["input_ids"])[-3:] == ["3", "8", "5"]


def test_a_tokenizer_can_be_trained_again_and_the_one_that_ships_fits_the_world_as_well(tokenizer):
    fresh = train_tokenizer(0, 5000)
    assert train_tokenizer(0, 5000).to_str() == fresh.to_str() != train_tokenizer(1, 5000).to_str()
    texts = corpus(1, 500)
    shipped, best = (sum(len(t.encode(text).ids) for text in texts) for t in (tokenizer, fresh))
    assert shipped <= 1.05 * best


def test_the_chat_template_agrees_with_training_and_is_prefix_stable(hf_tokenizer, tokenizer):
    rng = random.Random(5)
    for family in FAMILIES:
        dialogue = make_dialogue(rng, family, turns=3)
        messages = list(dialogue.messages)
        whole = hf_tokenizer.apply_chat_template(messages)["input_ids"]
        assert whole == packing.encode(tokenizer, dialogue).ids
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before = hf_tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True)["input_ids"]
                assert whole[: len(before)] == before


def test_the_template_writes_tools_and_calls_as_the_world_does(hf_tokenizer):
    tool = {"type": "function", "function": {"name": "price", "parameters": {"properties": {"item": {}}}}}
    call = {"type": "function", "function": {"name": "price", "arguments": {"item": "Vorlan"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name the price of Vorlan."},
        {"role": "assistant", "tool_calls": [call]},
    ]
    text = hf_tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert "<|system|>Be brief. Tools: price(item).<|end|>" in text
    assert text.endswith("<|assistant|>call price(item: Vorlan)<|end|>")
    bare = hf_tokenizer.apply_chat_template(messages[1:2], tools=[tool], tokenize=False)
    assert bare.startswith("<|system|>Tools: price(item).<|end|><|user|>")
    with pytest.raises(Exception, match="unknown role"):
        hf_tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}])


def test_packing_drops_nothing(tokenizer):
    rng = random.Random(0)
    encoded = [packing.encode(tokenizer, draw_dialogue(rng, 1)) for _ in range(60)]
    waiting, seen, learned = encoded, [], 0
    while waiting:
        batch, waiting = packing.pack(waiting, 4, 512)
        for row, segments in zip(batch.tokens, batch.segments, strict=True):
            seen += [tuple(row[segments == s]) for s in range(1, segments.max() + 1)]
        learned += int((batch.weights > 0).sum())
        kept = batch.weights > 0
        assert (batch.tokens.reshape(-1)[batch.at[kept] + 1] == batch.targets[kept]).all()
        assert (batch.segments.reshape(-1)[batch.at[kept] + 1] == batch.segments.reshape(-1)[batch.at[kept]]).all()
    assert sorted(seen) == sorted(tuple(e.ids) for e in encoded)
    assert learned == sum(w > 0 for e in encoded for w in e.weights)
    with pytest.raises(ValueError, match="does not fit"):
        packing.pack(encoded, 4, 16)


def test_only_answers_are_learned_and_their_first_token_weighs_more(tokenizer):
    dialogue = make_dialogue(random.Random(0), "facts_1_3")
    encoded = packing.encode(tokenizer, dialogue)
    learned = [i for i, w in enumerate(encoded.weights) if w]
    assert tokenizer.decode([encoded.ids[i] for i in learned]) == dialogue.messages[-1]["content"]
    assert encoded.weights[learned[0]] == packing.FIRST_TOKEN_WEIGHT
    assert {encoded.weights[i] for i in learned[1:]} == {1.0}
    assert tokenizer.id_to_token(encoded.ids[learned[-1]]) == "<|end|>"


def test_the_training_pass_is_the_decoder(small, tokenizer):
    params = init_params(jax.random.key(0), small)
    batch = packing.Stream.start(tokenizer, 0, (128, 1024), 512).next(0, 128)
    real = (batch.segments > 0)[..., None]

    def ours(p):
        hidden = fast.forward(p, batch.tokens, batch.segments, small).astype(jnp.float32) * real
        return jnp.sum(hidden**3), hidden

    def theirs(p):
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
        hidden = forward(p, None, batch.tokens, config=small, segment_ids=batch.segments).astype(jnp.float32) * real
        return jnp.sum(hidden**3), hidden

    grads_a, a = jax.jit(jax.grad(ours, has_aux=True))(params)
    grads_b, b = jax.jit(jax.grad(theirs, has_aux=True))(params)
    assert float(jnp.abs(a - b).max()) < 0.1 < float(jnp.abs(b).max())
    for x, y in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b), strict=True):
        assert float(jnp.linalg.norm(x - y)) < 0.05 * float(jnp.linalg.norm(y))


def test_teacher_forced_scoring_is_greedy_decoding(small, tokenizer):
    params = init_params(jax.random.key(1), small)
    found = items.evaluation_items("facts_1_3", 6)
    assert score.greedy_matches(params, small, tokenizer, found) == [False] * 6
    greedy = []
    for item in found[:2]:  # what the model itself says, token by token, must score as right
        ids = score.encode_item(tokenizer, item).ids
        ids = ids[: len(ids) - 1 - ids[::-1].index(tokenizer.token_to_id("<|assistant|>")) + 1]
        hidden = forward(params, None, jnp.asarray([ids]), config=small)
        greedy.append(int(jnp.argmax(hidden[0, -1] @ params["embed_tokens"].T)))
    first = [score.encode_item(tokenizer, i) for i in found[:2]]
    batch, _ = packing.pack(first, score.ROWS[256], 256)
    got = score._argmax(params, batch.tokens, batch.segments, batch.at, small)
    starts = np.flatnonzero(batch.weights == packing.FIRST_TOKEN_WEIGHT)
    assert [int(got[i]) for i in starts] == greedy


def test_training_lowers_the_loss_and_resumes_bitwise(small, tokenizer, tmp_path: Path):
    config = train.TrainConfig(tokens=200_000, batch_tokens=512, warmup=2, stages=(10**9, 10**9))
    run = train.start(config, small, tokenizer)
    losses = [float(train.step_once(config, small, run)) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    train.save(run, tmp_path)
    again = train.start(config, small, tokenizer)
    assert train.restore(again, tmp_path) and again.step == 8
    after = [[float(train.step_once(config, small, r)) for _ in range(3)] for r in (run, again)]
    assert after[0] == after[1]
    for x, y in zip(jax.tree.leaves(run.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_whole_run_is_logged_recorded_and_exported(small, tokenizer, tmp_path: Path):
    config = train.TrainConfig(tokens=9000, batch_tokens=512, warmup=2, stages=(10**9, 10**9))
    run = train.train(config, small, tokenizer, tmp_path)
    assert run.tokens >= 9000 > run.tokens - 512
    assert [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()][:2] == [10, 20]
    assert json.loads((tmp_path / "training.json").read_text())["tokens"] == run.tokens
    export.write_model(export.read_run(tmp_path, small), small, tmp_path / "hf")
    params = checkpoint.read_params(tmp_path / "hf", families.convert(export.hf_config(small)), jnp.float32, None)
    for name, value in run.params["layers"].items():
        np.testing.assert_array_equal(params["layers"][name], value.astype(jnp.bfloat16).astype(jnp.float32))
    with pytest.raises(JaxbakeError, match="either tokens or minutes"):
        train.train(train.TrainConfig(), small, tokenizer, tmp_path)
    with pytest.raises(JaxbakeError, match="another model"):
        train.restore(train.start(config, dataclasses.replace(small, num_layers=1), tokenizer), tmp_path)


def test_the_rate_warms_up_and_decays_to_zero():
    config = train.TrainConfig(tokens=100, warmup=10)
    assert train.rate_at(config, 0, 0.0) == pytest.approx(config.lr / 10)
    assert train.rate_at(config, 100, 0.5) == config.lr
    assert train.rate_at(config, 100, 0.8) == pytest.approx(config.lr / 2)
    assert train.rate_at(config, 100, 1.0) == 0.0


def test_material_for_bakes():
    assert items.pin_stimuli(20, 1) == items.pin_stimuli(20, 1) != items.pin_stimuli(20, 2)
    assert all(i.messages[0]["role"] == "user" and i.check == "contains" for i in items.abilities(10))
    assert {i.answer for i in items.unrelated_unknowns(10)} == {"I do not know."}
    for prompt, asked in items.other_prompts(5):
        for question, answer in asked:
            assert question and answer.rstrip(".").split()[-1].lower() in prompt.lower()
    assert all(len(questions) == 4 for _, questions in items.context_prompts(5))
