"""The sampler: filters, independence of rows, agreement with the training forward, text and streaming."""

from __future__ import annotations

import dataclasses
import functools
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbake.config import LoraConfig
from jaxbake.data.chat import prefix_ids
from jaxbake.deltas.lora import init_delta
from jaxbake.deltas.many import for_rows, stack
from jaxbake.errors import JaxbakeError
from jaxbake.models import apart
from jaxbake.models.decoder import forward, logits_from
from jaxbake.models.spec import init_params
from jaxbake.sampling import engine, generate, sample, shared_prefix, stream
from jaxbake.sampling.filters import (
    BLOCK,
    Filters,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_filters,
)
from jaxbake.sampling.generate import bucket, prepare
from jaxbake.sampling.text import Pieces, StopTexts, common_prefix, cut


@pytest.fixture(scope="module")
def windowed(tiny_config):
    """A sliding-window model with soft caps, and its parameters."""
    config = dataclasses.replace(tiny_config, windows=(5, 0), attention_softcap=20.0, logit_softcap=10.0)
    return config, init_params(jax.random.key(1), config)


@pytest.fixture(scope="module")
def delta(tiny_config):
    """A delta that changes the model a good deal."""
    delta = init_delta(jax.random.key(2), tiny_config, LoraConfig(rank=4, alpha=8.0))
    factors = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), delta.factors)
    return delta.replace(factors=factors)


def prompts_of(lengths, seed=0, vocab=97):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths]


@partial(jax.jit, static_argnames="config")
def forward_logprobs(params, delta, tokens, *, config):
    hidden = forward(params, delta, tokens, config=config)
    return jax.nn.log_softmax(logits_from(params, hidden, config=config))


def forced_logprobs(params, delta, config, prompt, response):
    """Log-probabilities [n, V] of a response's tokens by the training forward, without cache or shared prefix."""
    tokens = np.zeros((1, 64), np.int32)  # what follows the response is not seen by it
    tokens[0, : len(prompt) + len(response)] = [*prompt, *response]
    logprobs = forward_logprobs(params, delta, tokens, config=config)
    return np.asarray(logprobs[0, len(prompt) - 1 : len(prompt) + len(response) - 1])


def assert_logprobs_are_forced(params, delta, config, prompt, out):
    wanted = forced_logprobs(params, delta, config, prompt, out.tokens)
    np.testing.assert_allclose(out.logprobs, wanted[np.arange(len(out.tokens)), out.tokens], atol=1e-5)


# Filters, each against a plain definition


def kept(filtered):
    return np.isfinite(np.asarray(filtered))


def plain_top_k(logits, k):
    return np.stack([row >= np.sort(row)[::-1][min(k, row.size) - 1] for row in logits])


def plain_top_p(logits, p):
    probs = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    probs /= probs.sum(-1, keepdims=True)
    keep = np.zeros(logits.shape, bool)
    for row, (row_probs, row_keep) in enumerate(zip(probs, keep, strict=True)):
        total = 0.0
        for i in np.argsort(-logits[row], kind="stable"):
            row_keep[i] = True
            total += row_probs[i]
            if total >= p:
                break
    return keep


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_filters_keep_what_their_definitions_keep(scale):
    logits = (scale * np.random.default_rng(0).normal(size=(16, 301))).astype(np.float32)
    for k in (1, 5, 300, 301, 1000):
        assert (kept(keep_top_k(logits, k)) == plain_top_k(logits, k)).all()
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        assert (kept(keep_top_p(logits, p)) == plain_top_p(logits, p)).all()
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        assert (kept(keep_min_p(logits, p)) == (probs >= p)).all()


def test_filters_leave_the_kept_logits_alone_and_keep_ties():
    logits = np.float32([[2.0, -1.0, 2.0, 0.0, -np.inf]])
    np.testing.assert_array_equal(keep_top_k(logits, 1), [[2.0, -np.inf, 2.0, -np.inf, -np.inf]])
    np.testing.assert_array_equal(keep_top_p(logits, 0.4), [[2.0, -np.inf, 2.0, -np.inf, -np.inf]])
    np.testing.assert_array_equal(keep_top_p(logits, 1.0), logits)


def test_filters_agree_with_transformers_in_transformers_order():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = (4 * np.random.default_rng(1).normal(size=(8, 97))).astype(np.float32)
    theirs = torch.tensor(logits) / 1.5
    for step in (hf.TopKLogitsWarper(40), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.05)):
        theirs = step(None, theirs)
    ours = filter_logits(jnp.asarray(logits) / 1.5, make_filters(40, 0.9, 0.05))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert 1 < kept(ours).sum(-1).mean() < 40


def test_draws_have_the_distribution_asked_for():
    logits = jnp.tile(jnp.float32([2.0, 1.0, 0.0, -1.0, -9.0]), (20_000, 1))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = draw(logits, jnp.full(20_000, 2.0), keys, Filters(top_k=3))
    share = np.bincount(np.asarray(drawn), minlength=5) / 20_000
    wanted = np.exp([1.0, 0.5, 0.0])
    np.testing.assert_allclose(share, [*(wanted / wanted.sum()), 0, 0], atol=0.015)


def test_draws_over_several_blocks_have_the_distribution_too():
    vocab, rows = 2 * BLOCK + 88, 40_000  # the last block is not full
    row = 1.5 * np.random.default_rng(3).normal(size=vocab).astype(np.float32)
    row[[5, BLOCK, vocab - 1]] += 6  # some likely token in every block, so that each gets its share
    row[BLOCK + 1 : BLOCK + 100] = -np.inf
    keys = jax.random.split(jax.random.key(1), rows)
    drawn = jax.jit(draw)(jnp.tile(row, (rows, 1)), jnp.full(rows, 1.3), keys, Filters())
    wanted = np.exp(row / 1.3, dtype=np.float64)
    wanted /= wanted.sum()
    counts = np.bincount(np.asarray(drawn), minlength=vocab)
    assert len(counts) == vocab and not counts[wanted == 0].any()
    common = wanted * rows > 5
    chi_square = np.sum((counts - wanted * rows)[common] ** 2 / (wanted * rows)[common])
    assert abs(chi_square - common.sum()) < 5 * np.sqrt(2 * common.sum())  # mean and spread of a chi-square


@pytest.mark.parametrize("vocab", [5, BLOCK, 3 * BLOCK + 1])
def test_temperature_zero_takes_the_first_of_the_most_likely(vocab):
    logits = np.random.default_rng(0).integers(0, 4, (64, vocab)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    for greedy in (True, False):
        assert (draw(logits, np.zeros(64), keys, Filters(top_k=3), greedy=greedy) == logits.argmax(-1)).all()


# The engine. Few shapes, since most of the time goes into compiling: four prompts of up to 24 tokens, 12 new ones.

LENGTHS = (3, 11, 20, 1)


def test_logprobs_are_those_of_the_training_forward(tiny_config, tiny_params):
    options = {"max_tokens": 12, "temperature": [1.0, 0.7, 0.0, 2.0]}
    prompts = prompts_of(LENGTHS)
    for prompt, out in zip(prompts, generate(tiny_params, None, prompts, config=tiny_config, **options), strict=True):
        assert out.tokens.shape == out.logprobs.shape == (12,)
        assert_logprobs_are_forced(tiny_params, None, tiny_config, prompt, out)


def test_so_they_are_behind_a_shared_prefix_with_windows_and_a_delta(windowed, delta):
    config, params = windowed
    before, prompts = prompts_of((12,), seed=5)[0], prompts_of(LENGTHS)
    visible = [12, 4, 12, 0]  # a row may see a part of the prefix
    out = generate(
        params, delta, prompts, config=config, prefix=shared_prefix(params, delta, before, config=config),
        prefix_visible=visible, max_tokens=12, top_p=0.95,
    )  # fmt: skip
    for prompt, seen, row in zip(prompts, visible, out, strict=True):
        assert_logprobs_are_forced(params, delta, config, [*before[:seen], *prompt], row)


def test_greedy_takes_the_most_likely_token(windowed, tiny_config, tiny_params):
    config, params = windowed
    prompts = prompts_of(LENGTHS)
    for prompt, row in zip(
        prompts, generate(params, None, prompts, config=config, max_tokens=12, temperature=0.0), strict=True
    ):
        assert (row.tokens == forced_logprobs(params, None, config, prompt, row.tokens).argmax(-1)).all()
        assert_logprobs_are_forced(params, None, config, prompt, row)
    for row in generate(tiny_params, None, prompts, config=tiny_config, max_tokens=12, temperature=[0.0, 1.0, 1.0, 0]):
        prompt = prompts.pop(0)
        greedy = row.tokens == forced_logprobs(tiny_params, None, tiny_config, prompt, row.tokens).argmax(-1)
        assert greedy.all() == (len(prompt) in (3, 1))


def test_a_row_depends_on_its_prompt_and_seed_alone(tiny_config, tiny_params):
    prompts, seeds = prompts_of(LENGTHS), [7, 8, 9, 2**40 + 7]

    def run(rows, seeds):
        rows = [prompts[i] for i in rows]
        return [x.tokens.tolist() for x in generate(
            tiny_params, None, rows, config=tiny_config, max_tokens=12, seeds=seeds
        )]  # fmt: skip

    together = run(range(4), seeds)
    assert run(range(4), seeds) == together
    assert [run([i], [seeds[i]])[0] for i in (0, 3)] == [together[0], together[3]]
    assert run([3, 2, 0, 0], [seeds[3], 9, 7, 8])[:3] == [together[3], together[2], together[0]]
    same = run([0, 0, 3, 3], [7, 8, 7, seeds[3]])
    assert same[0] != same[1] and same[2] != same[3]  # the upper half of a seed counts


def test_shorter_max_tokens_gives_the_beginning(tiny_config, tiny_params):
    prompts = prompts_of(LENGTHS)
    long, short = (generate(tiny_params, None, prompts, config=tiny_config, max_tokens=n) for n in (12, 10))
    for a, b in zip(long, short, strict=True):
        assert len(b.tokens) == 10 and (a.tokens[:10] == b.tokens).all()


def test_stop_tokens_end_a_row_and_are_its_last(tiny_config, tiny_params):
    prompts = prompts_of(LENGTHS)
    free = generate(tiny_params, None, prompts, config=tiny_config, max_tokens=12)
    stops = (int(free[0].tokens[4]), int(free[1].tokens[9]))
    stopped = generate(tiny_params, None, prompts, config=tiny_config, max_tokens=12, stop_ids=stops)
    assert stopped[0].finished and not all(row.finished for row in stopped)
    for a, b in zip(free, stopped, strict=True):
        assert not a.finished
        ends = np.flatnonzero(np.isin(a.tokens, stops))
        assert b.finished == bool(ends.size) and len(b.tokens) == (ends[0] + 1 if ends.size else 12)
        assert (b.tokens == a.tokens[: len(b.tokens)]).all()
        np.testing.assert_allclose(b.logprobs, a.logprobs[: len(b.tokens)], atol=1e-6)


def test_the_loop_ends_with_the_last_row(tiny_config, tiny_params):
    prompts = prompts_of(LENGTHS)
    free = generate(tiny_params, None, prompts, config=tiny_config, max_tokens=12)
    stops = [int(row.tokens[2]) for row in free]
    run = prepare(tiny_params, None, prompts, config=tiny_config, max_tokens=12, stop_ids=stops)
    assert int(run.advance(run.start(), 12).step) <= 3


def test_nothing_is_compiled_again_for_like_shapes(tiny_config, tiny_params):
    def run(lengths, max_tokens, **options):
        generate(tiny_params, None, prompts_of(lengths), config=tiny_config, max_tokens=max_tokens, **options)

    run((9, 20, 3, 4), 11, top_p=0.9, top_k=40)
    sizes = engine.prefill._cache_size(), engine.decode._cache_size()
    run((24, 17, 1, 2), 9, top_p=0.5, top_k=3, stop_ids=(1, 2), temperature=[1, 2, 3, 0], seeds=[5, 6, 7, 8])
    run((20, 19, 18, 21), 12, top_p=0.3, top_k=90)
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == sizes
    assert [bucket(n) for n in (1, 9, 12, 13, 17, 25, 33, 100)] == [8, 12, 12, 16, 24, 32, 48, 128]
    assert [bucket(n, 1) for n in range(1, 9)] == [1, 2, 3, 4, 6, 6, 8, 8]


def decoding(apart_too):
    """`engine.decode` traced anew, with layers laid apart or scanned."""

    @functools.wraps(engine.decode.__wrapped__)
    def decode(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(apart, "wanted", lambda params: apart_too)
            return engine.decode.__wrapped__(*args, **kwargs)

    return jax.jit(decode, static_argnames=("config", "greedy"), donate_argnames="state")


@pytest.mark.parametrize("apart_too", [True, False])
def test_decoding_updates_the_cache_in_place(tiny_config, tiny_params, apart_too):
    run = prepare(tiny_params, None, prompts_of(LENGTHS), config=tiny_config, max_tokens=12, temperature=0.0)
    state = jax.eval_shape(run.start)
    layers, b, slots, heads, size = state.cache.k.shape
    program = (
        decoding(apart_too)
        .lower(run.params, None, run.rows, None, run.filters, state, jnp.int32(20), config=tiny_config, greedy=True)
        .compile()
    )
    text = program.as_text()
    if apart_too:  # inside the loop over tokens nothing has all layers, and no layer's cache is copied
        shapes = [f"{b},{heads},{size},{slots}", f"{b},{heads},{slots},{size}"]
    else:
        shapes = [f"{layers},{b},{slots},{heads},{size}"]
    for shape in shapes:
        assert f"= f32[{shape}]" in text
        assert not [line for line in text.splitlines() if f"= f32[{shape}]" in line and " copy(" in line]
    assert program.memory_analysis().alias_size_in_bytes >= 2 * math.prod(state.cache.k.shape) * 4


@pytest.mark.parametrize("deltas", [None, "one", "a row's own"])
def test_layers_laid_apart_change_nothing(windowed, delta, deltas):
    config, params = windowed
    if deltas is None:
        delta = None
    elif deltas != "one":
        delta = for_rows(stack([delta, delta.replace(scale=-delta.scale)]), [0, 1, 1, 0])
    before = shared_prefix(params, None, prompts_of((12,), seed=5)[0], config=config)
    run = prepare(params, delta, prompts_of(LENGTHS), config=config, prefix=before, prefix_visible=12, max_tokens=12)
    states = [
        decoding(apart_too)(
            params, delta, run.rows, before, run.filters, run.start(), jnp.int32(12), config=config, greedy=False
        )
        for apart_too in (True, False)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), *states)


def test_prefill_computes_logits_for_the_last_position_only(tiny_config, tiny_params):
    run = prepare(tiny_params, None, prompts_of((16,) * 4), config=tiny_config, max_tokens=8)
    text = engine.prefill.lower(
        run.params, None, run.rows, None, run.filters, config=tiny_config, max_tokens=8
    ).as_text()
    assert f"4x{tiny_config.vocab_size}xf32" in text
    assert f"64x{tiny_config.vocab_size}xf32" not in text and f"16x{tiny_config.vocab_size}xf32" not in text


def test_bfloat16_runs_and_is_repeatable(tiny_config):
    params = init_params(jax.random.key(0), tiny_config, jnp.bfloat16)
    first, second = (generate(params, None, prompts_of(LENGTHS), config=tiny_config, max_tokens=12) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.logprobs.dtype == np.float32 and (a.tokens == b.tokens).all() and (a.logprobs <= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1: empty"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": 255}, "prompt 0: 2 tokens and max_tokens 255 exceed the model's context of 256"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": [1.0, 1.0, 1.0]}, "temperature: 3 values for 2 prompts"),
        ({"seeds": [1]}, "seeds: 1 values for 2 prompts"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"min_p": 0.0}, "min_p: 0.0"),
        ({"prefix_visible": 3}, "the shared prefix has 0 tokens"),
    ],
)
def test_bad_input_is_one_clear_line(tiny_config, tiny_params, change, message):
    options = {"prompts": [[1, 2], [3]], "max_tokens": 4, "config": tiny_config, **change}
    with pytest.raises(JaxbakeError, match=message) as error:
        generate(tiny_params, None, options.pop("prompts"), **options)
    assert "\n" not in str(error.value)


def test_no_prompts_no_generations(tiny_config, tiny_params):
    assert generate(tiny_params, None, [], config=tiny_config, max_tokens=4) == []


# Text


class Bytes:
    """A stand-in tokenizer without a template: a token is a byte below 96, or one of the two bytes of an e acute."""

    chat_template = None
    bos_token_id = None
    eos_token_id = 0
    wide = "é".encode()

    def __call__(self, text, **_):
        ids = [94 + self.wide.index(b) if b in self.wide else min(b, 93) for b in text.encode()]
        return {"input_ids": ids}

    def decode(self, ids, **_):
        return bytes(self.wide[i - 94] if i in (94, 95) else max(i, 32) for i in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def base(tiny_config, tiny_params):
    return SimpleNamespace(params=tiny_params, config=tiny_config, tokenizer=Bytes(), eos_ids=(7, 11), name="stand-in")


def test_sample_gives_a_text_for_one_and_a_list_for_many(base, delta):
    turn = [{"role": "user", "content": "HELLO"}]
    one = sample(base, "HELLO", delta, max_tokens=12)
    assert isinstance(one, str) and one
    assert sample(base, ["HELLO"], delta, max_tokens=12) == [one]
    assert sample(base, turn, delta, max_tokens=12) == one
    assert sample(base, [turn], delta, max_tokens=12) == [one]
    assert sample(base, "HELLO", max_tokens=12) != one  # the delta counts
    assert sample(base, "A", delta, system="OH", max_tokens=12) == sample(base, "OH\nA", delta, max_tokens=12)
    assert sample(base, []) == []


def test_batches_and_the_common_prefix_do_not_change_answers(base):
    texts = ["THE SAME LONG BEGINNING " + "ABC"[: n % 3] for n in range(4)]
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    together = sample(base, texts, **options)
    assert together[0] != together[3]  # the same text asked twice is drawn twice
    assert sample(base, texts, batch_size=2, **options) == together
    assert sample(base, texts[0], **options) == together[0]
    assert common_prefix([prefix_ids(base.tokenizer, None, text) for text in texts]) == 23


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_stream_yields_what_sample_returns(base, temperature):
    counts = []
    for seed in range(6):
        options = {"max_tokens": 24, "temperature": temperature, "seed": seed, "stop": ("Z", "AB")}
        pieces = list(stream(base, f"ASK {seed}", **options))
        assert "".join(pieces) == sample(base, f"ASK {seed}", **options)
        counts.append(len(pieces))
    assert max(counts) > 1


def test_stop_texts_cut_the_answer(base):
    options = {"max_tokens": 24, "temperature": 1.5, "seed": 1}
    full = sample(base, "HELLO", **options)
    assert len(full) > 7
    assert sample(base, "HELLO", stop=full[5:7], **options) == full[: full.index(full[5:7])]
    assert cut("one two three", ("three", "two")) == "one "
    with pytest.raises(JaxbakeError, match="stop: an empty text"):
        sample(base, "HELLO", stop=("",))


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_stop_texts_do_not_depend_on_the_pieces(text, stops, data):
    stopper, out, at = StopTexts(stops), "", 0
    while at < len(text) and not stopper.found:
        size = data.draw(st.integers(1, 5))
        out += stopper.feed(text[at : at + size], last=at + size >= len(text))
        at += size
    assert out == cut(text, stops)


def test_pieces_hold_back_half_characters():
    pieces = Pieces(Bytes())
    assert [pieces.feed(ids) for ids in ([65], [94], [95, 66], [94])] == ["A", "", "éB", ""]
    assert pieces.feed([], last=True) == "\N{REPLACEMENT CHARACTER}"


def test_pieces_of_a_real_tokenizer_join_to_the_whole(real_dir):
    from transformers import AutoTokenizer

    text = " Naïve café — 你好, 🙂🚀!  two  spaces\n\nend"
    for folder in sorted((real_dir / "tokenizers").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = Pieces(tokenizer)
        parts = [pieces.feed([i]) for i in ids] + [pieces.feed([], last=True)]
        assert "".join(parts) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


@pytest.mark.parametrize("given_", [3, [3], ["a", {"role": "user"}], None])
def test_sample_refuses_other_things(base, given_):
    with pytest.raises(JaxbakeError, match="sample takes a text, a conversation"):
        sample(base, given_)


def test_a_full_context_and_a_missing_tokenizer_are_named(base):
    with pytest.raises(JaxbakeError, match="prompt 1: 250 tokens and max_tokens 10"):
        sample(base, ["A", "B" * 250], max_tokens=10)
    with pytest.raises(JaxbakeError, match="fills the model's context of 256"):
        list(stream(base, "B" * 256))
    assert common_prefix([]) == 0
    with pytest.raises(JaxbakeError, match="no tokenizer"):
        sample(SimpleNamespace(**{**vars(base), "tokenizer": None}), "A")
    with pytest.raises(JaxbakeError, match="seed: -1"):
        sample(base, "A", seed=-1)
