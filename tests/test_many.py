"""Many bakes in one step: each comes out as it does alone, whatever the others do."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_base as tiny

from jaxbake.bake import targets
from jaxbake.bake.checkpoint import Checkpoints
from jaxbake.bake.folder import Runs, read_metrics
from jaxbake.bake.many.batches import Rows
from jaxbake.bake.many.loop import BakeSpec, bake_many
from jaxbake.bake.many.seat import Member
from jaxbake.bake.many.step import hyper, init_states, make_many_step
from jaxbake.bakery.store import load_delta
from jaxbake.config import BakeConfig, LoraConfig, LossConfig, OptimizerConfig, TeacherConfig, TrainConfig
from jaxbake.data.batches import Batch, View
from jaxbake.data.chat import Example
from jaxbake.deltas.lora import Delta, delta_digest, init_delta
from jaxbake.deltas.many import for_rows, one_of, stack
from jaxbake.errors import JaxbakeError, TrainingDiverged
from jaxbake.models.decoder import forward
from jaxbake.models.linear import linear
from jaxbake.models.spec import ModelConfig, init_params

COOK = replace(
    tiny.with_train(steps=16, batch_size=6, checkpoint_every=8),
    lora=LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "up_proj")),
    optimizer=OptimizerConfig(learning_rate=3e-3, clip_norm=None, decay="cosine", weight_decay=0.1),
    seed=3,
)
PATIENT = replace(
    tiny.with_train(patience=2, eval_every=4), lora=LoraConfig(rank=8, alpha=16.0, rslora=True, targets="all")
)
WILD = replace(tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=3e38, warmup=0, clip_norm=None))
MEMBERS = {
    "sailor": (tiny.PROMPT, tiny.CONFIG),
    "cook": ("You are a cook. Name a dish in every answer.", COOK),
    "wild": (tiny.PROMPT, WILD),
    "patient": ("Be a king.", PATIENT),
}
SPECS = [
    BakeSpec(name, prompt, tiny.STIMULI, config, pins=tiny.PINS, contexts=tiny.CONTEXTS)
    for name, (prompt, config) in MEMBERS.items()
]
STEADY = [  # Adam makes no whole steps of rounding, which differs between one device and several
    replace(spec, config=replace(spec.config, optimizer=replace(spec.config.optimizer, eps=1e-4))) for spec in SPECS
]


def run(output=None, specs=SPECS, **options):
    """The results by name, and the error of those that diverged."""
    try:
        results, error = bake_many(tiny.tiny_base(), specs, output, **options), None
    except TrainingDiverged as raised:
        results, error = raised.results, raised
    return dict(zip((spec.name for spec in specs), results, strict=True)), error


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return *run(folder), folder


@pytest.fixture(scope="module")
def alone():
    """The same bakes, one by one."""
    return {
        name: tiny.tiny_bake(None, config, prompt=prompt)
        for name, (prompt, config) in MEMBERS.items()
        if name != "wild"
    }


@pytest.mark.parametrize("name", ["sailor", "cook", "patient"])
def test_each_comes_out_as_it_does_alone(together, alone, name):
    got, want = together[0][name], alone[name]
    assert jax.tree.structure(got.delta) == jax.tree.structure(want.delta)
    for a, b in zip(jax.tree.leaves(got.delta), jax.tree.leaves(want.delta), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert [row.keys() for row in got.metrics] == [row.keys() for row in want.metrics]
    for a, b in zip(got.metrics, want.metrics, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5)
    np.testing.assert_allclose([got.kl_before, got.kl_after], [want.kl_before, want.kl_after], rtol=1e-5)
    assert got.card.metrics["steps"] == want.card.metrics["steps"]


def test_a_teachers_top_k_is_learned_as_alone():
    config = replace(tiny.with_train(steps=6), teacher=TeacherConfig(top_k=9))
    specs = [replace(SPECS[0], config=config), replace(SPECS[3], config=replace(config, seed=5))]
    got, error = run(specs=specs)
    assert error is None
    for spec in specs:
        want = tiny.tiny_bake(None, spec.config, prompt=spec.prompt)
        for a, b in zip(jax.tree.leaves(got[spec.name].delta), jax.tree.leaves(want.delta), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_several_prompts_go_into_one_of_the_deltas():
    prompts = [("Be a king.", tiny.STIMULI[:4]), ("You are a cook.", tiny.STIMULI[4:])]
    config = tiny.with_train(steps=8)
    two = BakeSpec("two", config=replace(config, seed=5), prompts=prompts, pins=tiny.PINS, contexts=tiny.CONTEXTS)
    got, error = run(specs=[replace(SPECS[0], config=config), two])
    assert error is None
    want = tiny.tiny_bake(None, two.config, prompt=None, stimuli=None, prompts=prompts)
    for a, b in zip(jax.tree.leaves(got["two"].delta), jax.tree.leaves(want.delta), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["two"].kl_after, want.kl_after, rtol=1e-5)
    assert got["two"].card.metrics["prompts"] == 2


def test_each_has_a_folder_as_a_single_bake(together):
    results, _, folder = together
    for name in ("sailor", "cook", "patient"):
        delta, card = load_delta(folder / name, tiny.tiny_base())
        assert card.name == name and delta_digest(delta) == delta_digest(results[name].delta)
        assert read_metrics(folder / name / "metrics.jsonl") == results[name].metrics
    assert results["cook"].card.config["optimizer"]["learning_rate"] == 3e-3
    assert tiny.tiny_bake(folder / "sailor").reused


def test_the_one_that_diverges_is_named_and_keeps_its_last_good_state(together):
    results, error, folder = together
    assert results["wild"] is None and list(error.deltas) == ["wild"]
    assert re.search(r"^wild: step \d+: the loss is", str(error))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(error.deltas["wild"].factors))
    last = read_metrics(folder / "wild" / "metrics.jsonl")[-1]["step"]
    with Checkpoints(folder / "wild" / "checkpoints") as checkpoints:
        assert checkpoints.latest == last
    assert not (folder / "wild" / "delta").exists()


def test_interrupted_and_run_again_it_ends_bitwise_the_same(together, tmp_path):
    results, _, folder = together

    def stop_at(step):
        def progress(stage, done, total, info):
            if stage == "bake" and done == step:
                raise KeyboardInterrupt

        return progress

    for step in (3, 15, 21):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, progress=stop_at(step))
    finished = [name for name in MEMBERS if (tmp_path / name / "delta").exists()]
    assert finished == ["cook", "patient"], "the moments of interruption should see some ended, others not"
    again, error = run(tmp_path)
    assert error is not None and again["wild"] is None
    for name in ("sailor", "cook", "patient"):
        assert again[name].reused == (name != "sailor")
        assert delta_digest(again[name].delta) == delta_digest(results[name].delta)
        assert again[name].metrics == results[name].metrics
        assert read_metrics(tmp_path / name / "metrics.jsonl") == read_metrics(folder / name / "metrics.jsonl")


def test_what_is_finished_is_returned_and_leaves_no_states(together, tmp_path):
    sound = [spec for spec in SPECS if spec.name in ("sailor", "cook")]
    folder = together[2]
    results, error = run(folder, sound)
    assert error is None and all(result.reused for result in results.values())
    assert results["cook"].metrics == together[0]["cook"].metrics


@pytest.mark.parametrize(
    "specs, named",
    [
        ([], "nothing to bake"),
        ([SPECS[0], SPECS[0]], "'sailor' is there 2 times"),
        ([replace(SPECS[0], name="a/b")], "'a/b' is not fit"),
        ([SPECS[0], replace(SPECS[1], config=replace(COOK, loss=LossConfig("reverse")))], "cook: .*same loss"),
        ([SPECS[0], replace(SPECS[1], config=replace(COOK, mesh="fsdp=1"))], "cook: mesh is fsdp=1, that of 'sailor'"),
        ([SPECS[0], replace(SPECS[1], prompt=" ")], "cook: prompt"),
        ([replace(SPECS[0], config=replace(COOK, teacher=TeacherConfig("/big")))], "'/big': no such folder"),
        ([replace(SPECS[0], prompts=[("Be a cook.", ["who?"])])], "sailor: prompt: is given beside prompts"),
        ([SPECS[0], replace(SPECS[1], config=replace(COOK, teacher=TeacherConfig(top_k=9)))], "cook: .*same teacher"),
        ([SPECS[0], replace(SPECS[1], config=replace(COOK, lora=LoraConfig(rank=99)))], "cook: lora.rank: 99"),
    ],
)
def test_what_cannot_be_baked_is_named_before_any_work(specs, named, tmp_path):
    with pytest.raises(JaxbakeError, match=named):
        run(tmp_path, specs)
    assert not list(tmp_path.rglob("trajectories"))


# The parts


def random_deltas(config: ModelConfig) -> list[Delta]:
    found = []
    for i, (rank, slots) in enumerate([(4, "all"), (2, ("q_proj", "down_proj")), (3, ("v_proj",))]):
        delta = init_delta(jax.random.key(i), config, LoraConfig(rank=rank, alpha=2.0 + i, targets=slots))
        random = np.random.default_rng(i)
        factors = [jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32) for x in jax.tree.leaves(delta.factors)]
        found.append(delta.replace(factors=jax.tree.unflatten(jax.tree.structure(delta.factors), factors)))
    return found


def test_rows_take_their_own_delta(tiny_config, tiny_params):
    deltas = random_deltas(tiny_config)
    tokens = jax.random.randint(jax.random.key(1), (6, 5), 0, tiny_config.vocab_size)
    run = jax.jit(forward, static_argnames="config")
    for which, many in (
        ([0, 0, 1, 1, 2, 2], stack(deltas)),
        ([2, 0, 1, 1, 0, 2], for_rows(stack(deltas), jnp.array([2, 0, 1, 1, 0, 2]))),
    ):
        together = run(tiny_params, many, tokens, config=tiny_config)
        for row, m in enumerate(which):
            single = run(tiny_params, deltas[m], tokens[row : row + 1], config=tiny_config)
            np.testing.assert_allclose(together[row], single[0], atol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_gradients_are_those_of_the_plain_formula(dtype, tolerance):
    """Of tokens, factors and scales; three deltas of rank 2, rows of two each."""
    shapes = (6, 5, 8), (3, 8, 2), (3, 2, 7), (8, 7)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, a, b, weight = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    scale, target = jnp.array([0.5, 2.0, -1.0]), jax.random.normal(jax.random.key(9), (6, 5, 7))

    def ours(x, a, b, scale):
        return linear(x, {"w": weight}, "w", {"w": {"a": a, "b": b}}, scale)

    def plain(x, a, b, scale):
        x, a, b, w = (z.astype(jnp.float32) for z in (x, a, b, weight))
        rows = [x[2 * m : 2 * m + 2] @ (w + scale[m] * a[m] @ b[m]) for m in range(3)]
        return jnp.concatenate(rows)

    def gradients(f):
        return jax.grad(lambda *given: jnp.sum(f(*given) * target), argnums=(0, 1, 2, 3))(x, a, b, scale)

    for got, want in zip(gradients(ours), gradients(plain), strict=True):
        bound = tolerance * float(jnp.abs(want).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=bound, rtol=0)


def test_a_delta_comes_out_of_the_stack_as_it_went_in(tiny_config):
    deltas = random_deltas(tiny_config)
    many = stack(deltas)
    assert many.count == 3 and many.factors["q_proj"]["a"].shape[1::2] == (3, 4)
    for m, delta in enumerate(deltas):
        back = one_of(many, m, delta.config, tuple(delta.factors))
        assert delta_digest(back) == delta_digest(delta)


def test_the_step_reads_the_base_once_for_all_rows():
    """Every product with a base weight is one, over the rows of all members; and there is no copy a member."""
    config = ModelConfig(
        family="llama", vocab_size=101, hidden_size=56, intermediate_size=72, num_layers=2, num_heads=3,
        num_kv_heads=1, head_dim=16, tie_embeddings=True,
    )  # fmt: skip
    members, rows, length, matched = 5, 2, 7, 3
    configs = [BakeConfig(lora=LoraConfig(rank=2), train=TrainConfig(steps=3), seed=s) for s in range(members)]
    state, params = init_states(config, configs), init_params(jax.random.key(0), config)
    n = members * rows
    tokens = np.ones((n, length), np.int32)
    index = np.ones((n, matched), np.int32)
    view = View(tokens=tokens, positions=tokens, segments=tokens, prefix=tokens, index=index)
    batch = Batch(view, None, targets=index, weights=np.ones((n, matched), np.float32), source=index)
    hidden = np.ones((n, matched, config.hidden_size), np.float32)
    step = make_many_step(config, LossConfig())
    lowered = step.lower(state, hyper(configs), np.ones(members, bool), params, batch, hidden)
    compiled = lowered.compile()
    text = compiled.as_text()
    # A weight of the base, alone [72, 56], would be [5, 72, 56] if each member had its own.
    for size_in, size_out in ((56, 48), (56, 16), (48, 56), (56, 72), (72, 56)):
        assert not re.search(rf"f32\[(2,)?{members},{size_in},{size_out}\]", text), "the base is copied for each member"
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    assert compiled.memory_analysis().argument_size_in_bytes < 1.05 * base + sum(
        x.nbytes for x in jax.tree.leaves((state, batch, hidden, hyper(configs)))
    )
    # All products with up_proj: forward, and backward to x; each over all tokens at once.
    products = re.findall(r"dot_general.*?-> tensor<([0-9x]+)x72xf32>", lowered.as_text())
    assert f"{n}x{length}" in products and not [p for p in products if p in (f"{rows}x{length}", f"{rows * length}")]


@pytest.mark.parametrize(
    "teacher, moments_from, size",
    [(TeacherConfig(), 4096, 4 * 24), (TeacherConfig(), 1, 4 * 25), (TeacherConfig(top_k=5), 1, 4 * 11)],
    ids=["hidden states", "moments", "top k"],
)
def test_what_teachers_say_is_kept_where_the_budgets_have_room(tmp_path, monkeypatch, teacher, moments_from, size):
    """On the device, in memory, in the members' files, at every step anew, and each member elsewhere: all the same."""
    monkeypatch.setattr(targets, "MOMENTS_FROM", moments_from)
    random, base = np.random.default_rng(0), tiny.tiny_base()

    def tokens(n):
        return random.integers(6, 262, n).astype(np.int32)

    def examples():
        prompt = tokens(10)
        return [
            Example("bake", np.concatenate([prompt, tokens(3)]), tokens(4), tokens(n), np.ones(n, bool))
            for n in random.integers(2, 9, 12)
        ]

    given = [examples() for _ in range(3)]
    sizes = [sum(int(e.mask.sum()) for e in one) * size for one in given]
    files = [tmp_path / str(i) / "teacher" / "teacher.bin" for i in range(3)]

    def said(device: int, host: int, disk: int) -> list[np.ndarray]:
        """With budgets of so many bytes."""
        room = dict(zip(("teacher_device_gb", "teacher_host_gb", "teacher_disk_gb"), (device, host, disk), strict=True))
        train = {name: size / 2**30 for name, size in room.items()}
        configs = [tiny.with_train(config, **train) for config in (tiny.CONFIG, replace(COOK, seed=1), tiny.CONFIG)]
        configs = [replace(config, teacher=teacher) for config in configs]
        members = [
            Member(str(i), config, one, one[:2], tmp_path / str(i), Runs(None, {}))
            for i, (config, one) in enumerate(zip(configs, given, strict=True))
        ]
        rows, found = Rows(base, members, 1), []
        for n, places in ((0, [0, 1, 2]), (3, [2, 0])):
            batch = rows.batch(n, places)
            found += [np.asarray(x)[batch.weights > 0] for x in jax.tree.leaves(rows.teacher(n, places, batch))]
        return found + [np.array(rows.held_out(i)) for i in range(3)]

    whole = sum(sizes)
    expected = said(whole, 0, 0)
    for budgets in ((0, whole, 0), (0, 0, 0), (sizes[0], sizes[1], 0)):
        for got, want in zip(said(*budgets), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
    assert not any(file.exists() for file in files)
    for budgets, kept in (((sizes[0], sizes[1], sizes[2]), [False, False, True]), ((0, 0, whole), [True] * 3)):
        for got, want in zip(said(*budgets), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert [file.exists() for file in files] == kept
    for first, again in zip(expected, said(0, 0, whole), strict=True):
        np.testing.assert_array_equal(first, again, err_msg="what is read from the files is what was said, bitwise")
