"""The bake step: what is in the compiled program, what is not, and that its arithmetic is right."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbake.bake import teacher
from jaxbake.bake.step import init_state, learning_rate, make_bake_step, make_eval_step, make_optimizer
from jaxbake.bake.teacher import hidden_at
from jaxbake.config import BakeConfig, LoraConfig, LossConfig, OptimizerConfig, TrainConfig
from jaxbake.data.batches import Batch, View
from jaxbake.models.decoder import forward, prefix_from, unembedding
from jaxbake.models.spec import ModelConfig, init_params, linear_shapes
from jaxbake.objectives import moments_of, reference_kl, top_k_of

# Sizes of which no two are equal, so that an array of the base's shape can be told from any other.
CONFIG = ModelConfig(
    family="llama", vocab_size=331, hidden_size=48, intermediate_size=112, num_layers=8, num_heads=6, num_kv_heads=2,
    head_dim=12, max_positions=128, tie_embeddings=False, init_range=0.2,
)  # fmt: skip
PROMPT = np.arange(5, 12, dtype=np.int32)


def bake_config(targets=("q_proj", "down_proj"), **optimizer) -> BakeConfig:
    return BakeConfig(
        lora=LoraConfig(rank=4, alpha=8.0, targets=targets),
        optimizer=OptimizerConfig(**{"learning_rate": 1e-2, "warmup": 0.0, **optimizer}),
        train=TrainConfig(steps=50),
    )


def make_batch(rows: int, length: int = 13, seed: int = 0, vocab: int = CONFIG.vocab_size) -> Batch:
    """Rows of a question and a response; the teacher's row stands behind the shared prompt. The last token is padding,
    and every row has as many matched tokens as its number allows, so that rows weigh differently."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, vocab, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, -1] = 0
    index = np.tile(np.arange(length - 7, length - 2), (rows, 1)).astype(np.int32)
    weights = (np.arange(index.shape[1])[None] <= np.arange(rows)[:, None]).astype(np.float32)
    positions = np.tile(np.arange(length), (rows, 1)).astype(np.int32)
    student = View(tokens, positions, segments, np.zeros_like(tokens), index)
    teacher = View(tokens, positions + len(PROMPT), segments, np.full_like(tokens, len(PROMPT)), index)
    source = np.where(weights > 0, np.arange(index.size).reshape(index.shape), -1).astype(np.int32)
    return Batch(student, teacher, np.take_along_axis(tokens, index + 1, 1), weights, source)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=1)(jax.random.key(3), CONFIG)


@pytest.fixture(scope="module")
def prefix(params):
    return jax.jit(lambda p: prefix_from(p, None, jnp.asarray(PROMPT), config=CONFIG))(params)


@pytest.fixture(scope="module", params=[False, True], ids=["all positions", "wanted positions"])
def compiled(request, params, prefix):
    config = bake_config("all")
    few = make_batch(1, length=11)  # tokens, so that no factors are added to the weights, which makes such sizes too
    args = init_state(jax.random.key(0), CONFIG, config), params, few, prefix
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(teacher, "WORTH_FLOPS", 0)
        traced = make_bake_step(CONFIG, config).trace(*args)
    return args, traced, traced.lower().compile()


step_of = lru_cache(partial(make_bake_step, CONFIG))  # each compiles for seconds


def run(params, prefix, config=None, batch=None, steps=1, **kwargs):
    config = config or bake_config()
    step, state = step_of(config), init_state(jax.random.key(0), CONFIG, config)
    for _ in range(steps):
        state, metrics = step(state, params, make_batch(4) if batch is None else batch, prefix, **kwargs)
    return state, {k: float(v) for k, v in metrics.items()}


def all_jaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_jaxprs(inner)


def base_shapes() -> set[tuple[int, ...]]:
    """Shapes that only a base weight or its gradient has: per layer, stacked, either way round, and the embeddings."""
    shapes = {(CONFIG.vocab_size, CONFIG.hidden_size), (CONFIG.hidden_size, CONFIG.vocab_size)}
    for (i, _), (o, _) in linear_shapes(CONFIG).values():
        shapes |= {(i, o), (o, i), (CONFIG.num_layers, i, o), (CONFIG.num_layers, o, i)}
    return shapes


def base_sized_products(jaxpr) -> list:
    return [
        eqn
        for inner in all_jaxprs(jaxpr)
        for eqn in inner.eqns
        if eqn.primitive.name in ("dot_general", "add_any", "scatter-add", "mul", "add")
        for out in eqn.outvars
        if out.aval.shape in base_shapes()
    ]


def test_no_gradient_of_the_base(compiled):
    args, traced, _ = compiled
    assert base_sized_products(traced.jaxpr.jaxpr) == []


def test_the_check_for_base_gradients_would_find_one(params):
    """Differentiate the base on purpose: the check above must see it."""

    def loss(params, batch):
        hidden = hidden_at(params, None, batch.student, config=CONFIG)
        return jnp.sum(hidden * hidden)

    found = base_sized_products(jax.make_jaxpr(jax.grad(loss))(params, make_batch(4)).jaxpr)
    assert len(found) >= len(linear_shapes(CONFIG))


def test_the_base_is_in_the_program_once(compiled, params):
    """Each stacked weight is one argument that nothing copies, transposes or converts, and none is a constant."""
    args, _, program = compiled
    arguments = sum(x.nbytes for x in jax.tree.leaves(jax.tree.map(jnp.asarray, args)))
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes <= arguments
    assert memory.output_size_in_bytes < sum(x.nbytes for x in jax.tree.leaves(params))
    text = program.as_text()
    made = re.findall(r"= f32\[([\d,]+)\]\S* ([a-z][\w\-]*)\(", text)
    weights = [w.shape for w in jax.tree.leaves(params) if w.size > 5000]
    assert len(weights) == len(linear_shapes(CONFIG)) + 2
    for shape in set(weights):
        for order in {shape, (*shape[:-2], shape[-1], shape[-2])} - (set(weights) - {shape}):
            ops = {op for dims, op in made if dims == ",".join(map(str, order))}
            assert ops <= {"parameter", "get-tuple-element", "bitcast"}, (order, ops)
        entry = [dims for dims, op in re.findall(r"= f32\[([\d,]+)\]\S* (parameter)\(", text[text.index("ENTRY") :])]
        assert entry.count(",".join(map(str, shape))) == weights.count(shape)


def test_the_state_is_donated(params, prefix):
    config = bake_config()
    state = init_state(jax.random.key(0), CONFIG, config)
    new, _ = step_of(config)(state, params, make_batch(4), prefix)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.delta.factors))
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, new)))


def test_no_recompilation_after_the_first_step_of_each_shape(params, prefix):
    config = bake_config()
    step, state = step_of(config), init_state(jax.random.key(0), CONFIG, config)
    for rows in (4, 5):
        state, _ = step(state, params, make_batch(rows), prefix)
    compiled = step._cache_size()
    assert compiled >= 2
    for i in range(6):
        state, _ = step(state, params, make_batch(4 + i % 2, seed=i), prefix)
    assert step._cache_size() == compiled


@pytest.mark.parametrize("init", ["a_random", "b_random"])
def test_a_delta_of_nothing_is_the_base_bit_for_bit(params, init):
    config = replace(bake_config(), lora=LoraConfig(rank=4, alpha=8.0, init=init))
    state, tokens = init_state(jax.random.key(0), CONFIG, config), make_batch(4).student.tokens
    plain = jax.jit(lambda p, d: forward(p, d, tokens, config=CONFIG))
    np.testing.assert_array_equal(plain(params, None), plain(params, state.delta))


@pytest.mark.parametrize("said", [None, partial(top_k_of, k=8), moments_of], ids=["asked", "top k", "moments"])
def test_only_matched_tokens_are_projected(params, prefix, said):
    """Loss and gradient (by plain SGD) are the same; no logits of the padding are made."""
    config, batch = bake_config(clip_norm=None), make_batch(4)
    matched = np.flatnonzero(batch.source >= 0)
    assert matched.size == 10
    some = batch.replace(kept=np.append(matched, [1, 1]).astype(np.int32))
    known = None
    if said is not None:
        known = said(hidden_at(params, None, batch.teacher, config=CONFIG, prefix=prefix), unembedding(params))
    step, results = make_bake_step(CONFIG, config, optax.sgd(1.0)), []
    for given in (batch, some):
        state = init_state(jax.random.key(0), CONFIG, config).replace(opt_state=optax.sgd(1.0).init({}))
        if said is None:
            made = {x.aval.shape for jaxpr in all_jaxprs(step.trace(state, params, given, prefix).jaxpr.jaxpr)
                    for eqn in jaxpr.eqns for x in eqn.outvars}  # fmt: skip
            count = given.source.size if given.kept is None else given.kept.size
            assert {shape[0] for shape in made if len(shape) == 2 and shape[1] == CONFIG.vocab_size} == {count}
        state, metrics = step(state, params, given, None if said else prefix, known)
        results.append((jax.tree.leaves(state.delta.factors), metrics))
    (all_factors, all_metrics), (some_factors, some_metrics) = results
    assert some_metrics["loss"] > 0 and some_metrics["tokens"] == 10
    for name in all_metrics:
        np.testing.assert_allclose(some_metrics[name], all_metrics[name], rtol=2e-6)
    for a, b in zip(some_factors, all_factors, strict=True):  # factors of about 0.1: sums in another order
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-7)
    if said is not moments_of:
        evaluate, delta = make_eval_step(CONFIG, config), state.delta
        found = [evaluate(delta, params, given, None if said else prefix, known) for given in (batch, some)]
        np.testing.assert_allclose(found[1], found[0], rtol=2e-6)


def test_where_both_views_are_equal_the_first_loss_is_zero(params, prefix):
    """A pin: the teacher sees none of the prompt, and a delta of nothing is the same model."""
    batch = make_batch(4)
    _, metrics = run(params, prefix, batch=batch.replace(teacher=batch.student))
    assert metrics["loss"] == pytest.approx(0, abs=1e-9)


def test_every_factor_gets_a_gradient_under_compilation(params, prefix):
    config = bake_config("all")
    step, start = step_of(config), init_state(jax.random.key(0), CONFIG, config)
    before = jax.tree.map(np.array, start.delta.factors)
    state = start
    for _ in range(2):  # the factor before the zero one learns from the second step on
        state, _ = step(state, params, make_batch(1), prefix)
    changed = jax.tree.map(lambda a, b: bool(np.all(np.any(a != b, axis=(1, 2)))), before, state.delta.factors)
    assert set(changed) == set(linear_shapes(CONFIG))
    assert all(jax.tree.leaves(changed)), changed


@pytest.mark.parametrize("worth", [teacher.WORTH_FLOPS, 0], ids=["all positions", "wanted positions"])
def test_loss_and_gradient_are_those_of_the_reference(params, prefix, worth, monkeypatch):
    """The mean over weighted tokens of KL(teacher || student), computed in full; plain SGD shows the gradient. With the
    last layer at all positions or at those that are matched."""
    config, batch = bake_config(clip_norm=None), make_batch(4)
    state = init_state(jax.random.key(0), CONFIG, config)
    state = state.replace(delta=state.delta.replace(factors=jax.tree.map(lambda x: x + 0.01, state.delta.factors)))

    def loss(factors):
        student = hidden_at(params, state.delta.replace(factors=factors), batch.student, config=CONFIG)
        prompted = hidden_at(params, None, batch.teacher, config=CONFIG, prefix=prefix)
        total, count = reference_kl(student, unembedding(params), prompted, unembedding(params), batch.weights)
        return total / count

    value, gradient = jax.value_and_grad(loss)(state.delta.factors)
    before = jax.tree.map(np.array, state.delta.factors)
    sgd = optax.sgd(1.0)
    step = make_bake_step(CONFIG, config, sgd)
    monkeypatch.setattr(teacher, "WORTH_FLOPS", worth)
    state, metrics = step(state.replace(opt_state=sgd.init(state.delta.factors)), params, batch, prefix)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["tokens"]) == batch.weights.sum()
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    step_taken = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.delta.factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6), step_taken, gradient)


def test_the_whole_prompt_reaches_the_teacher(params, prefix):
    """The teacher behind the cached prompt is the model reading prompt and row in one piece."""
    view = make_batch(2).teacher
    whole = np.concatenate([np.tile(PROMPT, (2, 1)), view.tokens[:, :-1]], 1)
    hidden = forward(params, None, whole, config=CONFIG)
    expected = np.take_along_axis(np.asarray(hidden), view.index[..., None] + len(PROMPT), 1)
    np.testing.assert_allclose(
        hidden_at(params, None, view, config=CONFIG, prefix=prefix), expected, rtol=1e-4, atol=1e-4
    )


def test_accumulation_equals_one_big_batch(params, prefix):
    """Rows differ in their number of tokens: a mean of means would not pass. Five rows do not divide by two.

    Adam's eps stands well above rounding: without, a gradient that is nothing but rounding makes a whole step.
    """
    one_state, one = run(params, prefix, bake_config(eps=1e-5), make_batch(5), steps=3)
    many_state, many = run(params, prefix, bake_config(eps=1e-5, accumulate=2), make_batch(5), steps=3)
    assert many["tokens"] == one["tokens"]
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-4),
        one_state.delta.factors,
        many_state.delta.factors,
    )


def test_padding_weighs_nothing(params, prefix):
    """A row of padding, and other tokens in the padding, change neither loss nor gradient."""
    batch = make_batch(4)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), batch)
    noisy = padded.student.tokens.copy()
    noisy[:4, -1], noisy[4] = 7, 11
    padded = padded.replace(student=padded.student.replace(tokens=noisy))
    _, plain = run(params, prefix, batch=batch)
    _, with_padding = run(params, prefix, batch=padded)
    assert with_padding["tokens"] == plain["tokens"]
    assert with_padding["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert with_padding["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_cross_entropy_runs_no_teacher(params, prefix):
    config = replace(bake_config(), loss=LossConfig(divergence="cross_entropy"))

    def fail(*_):
        raise AssertionError("cross-entropy asked for a teacher")

    batch = make_batch(4)
    _, metrics = make_bake_step(CONFIG, config, teacher=fail)(
        init_state(jax.random.key(0), CONFIG, config), params, batch, prefix
    )
    hidden = hidden_at(params, None, batch.student, config=CONFIG)
    log_q = jax.nn.log_softmax(hidden @ unembedding(params).T)
    loss = -np.take_along_axis(np.asarray(log_q), batch.targets[..., None], -1)[..., 0]
    assert float(metrics["loss"]) == pytest.approx((loss * batch.weights).sum() / batch.weights.sum(), rel=1e-5)


def test_known_teacher_states_give_the_same_step(params, prefix):
    batch = make_batch(5)
    hidden = hidden_at(params, None, batch.teacher, config=CONFIG, prefix=prefix)
    _, online = run(params, prefix, bake_config(), batch)
    _, known = run(params, None, bake_config(accumulate=2), batch, known=hidden)
    assert known["loss"] == pytest.approx(online["loss"], rel=1e-4)
    assert known["grad_norm"] == pytest.approx(online["grad_norm"], rel=1e-3)


def test_recomputation_changes_nothing(params, prefix):
    config = bake_config()
    _, plain = run(params, prefix, config, steps=3)
    _, remat = run(params, prefix, replace(config, train=replace(config.train, remat=True)), steps=3)
    assert remat["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(params, prefix):
    config = bake_config()
    step, state = step_of(config), init_state(jax.random.key(0), CONFIG, config)
    state, _ = step(state, params, make_batch(4), prefix)
    kept = jax.tree.map(np.array, (state.delta.factors, state.opt_state))
    broken = {**params, "norm": params["norm"].at[0].set(jnp.nan)}
    state, metrics = step(state, broken, make_batch(4), prefix)
    assert not np.isfinite(metrics["loss"])
    for _ in range(2):  # and it stays, also when later batches are fine
        assert not state.good
        assert int(state.step) == 1
        jax.tree.map(np.testing.assert_array_equal, kept, (state.delta.factors, state.opt_state))
        state, _ = step(state, params, make_batch(4), prefix)


def test_the_step_lowers_the_held_out_divergence(params, prefix):
    config = bake_config()
    evaluate = make_eval_step(CONFIG, config)
    state, _ = run(params, prefix, config, steps=40)
    start = init_state(jax.random.key(0), CONFIG, config).delta
    before, count, agree_before = map(float, evaluate(start, params, make_batch(4), prefix))
    after, _, agree_after = map(float, evaluate(state.delta, params, make_batch(4), prefix))
    assert after < 0.3 * before
    assert agree_before < agree_after <= count == make_batch(4).weights.sum()


def test_the_learning_rate_warms_up_and_decays():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=0.1), 100)
    values = [float(rate(i)) for i in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert max(values) == values[10] == 1.0
    assert np.all(np.diff(values[:11]) > 0) and np.all(np.diff(values[10:]) < 0)
    assert values[-1] == pytest.approx(1 / 90, rel=1e-5)
    flat = learning_rate(OptimizerConfig(learning_rate=2.0, warmup=0.0, decay="constant"), 10)
    assert {float(flat(i)) for i in range(10)} == {2.0}


def test_weight_decay_shrinks_and_clipping_bounds():
    weights, none = {"a": jnp.float32([2.0, -4.0])}, {"a": jnp.zeros(2)}
    decayed = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0), 10)
    updates, _ = decayed.update(none, decayed.init(weights), weights)
    np.testing.assert_allclose(updates["a"], [-0.1, 0.2], rtol=1e-6)
    for clip, kept in ((1.0, 0.2), (None, 1.0)):  # Adam's first moment shows what it was given
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, b1=0.0), 10)
        _, state = optimizer.update({"a": jnp.float32([3.0, -4.0])}, optimizer.init(weights), weights)
        moment = next(x.mu["a"] for x in state if hasattr(x, "mu"))
        np.testing.assert_allclose(moment, np.float32([3.0, -4.0]) * kept, rtol=1e-6)
