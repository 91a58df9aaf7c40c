"""Another model as teacher: it answers, it is imitated, it is asked once, and then it is gone."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_base as tiny

import jaxbake.bake.other as room
from jaxbake.bake.many.loop import BakeSpec, bake_many
from jaxbake.bake.other import Other
from jaxbake.bakery.store import load_delta
from jaxbake.config import TeacherConfig
from jaxbake.data.chat import example_from_response, prefix_ids
from jaxbake.data.trajectories import TrajectoryStore
from jaxbake.deltas.lora import delta_digest
from jaxbake.errors import JaxbakeError
from jaxbake.models.base import Base
from jaxbake.models.decoder import forward, logits_from
from jaxbake.models.spec import init_params
from jaxbake.sampling import generate

LARGER = replace(
    tiny.tiny_base().config, vocab_size=270, hidden_size=32, num_layers=3, intermediate_size=48, tie_embeddings=False
)  # with rows for tokens that do not exist, as models of one family have them in different numbers
CONFIG = replace(tiny.with_train(steps=12, eval_every=6), teacher=TeacherConfig(top_k=16))


@pytest.fixture(scope="module")
def larger() -> Base:
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(7), LARGER)
    return replace(tiny.tiny_base(), params=params, config=LARGER, digest="digest of larger", name="larger")


@pytest.fixture(scope="module")
def imitated(larger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "like_larger"
    return tiny.tiny_bake(folder, CONFIG, teacher=larger), folder


def log_probs(base: Base, ids: np.ndarray) -> np.ndarray:
    hidden = forward(base.params, None, ids[None], config=base.config)
    return np.asarray(jax.nn.log_softmax(logits_from(base.params, hidden, config=base.config)[0, :, :262]))


def test_it_answers_but_for_the_pins_and_is_come_nearer(imitated, larger):
    result, folder = imitated
    rows, base = TrajectoryStore.open(folder / "trajectories").load(), tiny.tiny_base()
    for kind, who, prompt in (("bake", larger, tiny.PROMPT), ("pin", base, None)):
        row = next(row for row in rows if row.kind == kind)
        ids = prefix_ids(base.tokenizer, prompt, row.stimulus)
        drawn = generate(
            who.params, None, [ids], config=who.config, max_tokens=6, temperature=row.temperature,
            stop_ids=base.eos_ids, seeds=[row.seed],
        )  # fmt: skip
        assert tuple(drawn[0].tokens.tolist()) == row.response_ids
    assert max(max(row.response_ids) for row in rows) < 262  # never a filler
    assert result.kl_after < 0.97 * result.kl_before
    assert (result.card.teacher, result.card.teacher_digest) == ("larger", "digest of larger")
    assert load_delta(folder, base)[1] == result.card


def test_the_divergence_is_that_to_the_prompted_other_over_its_likeliest(imitated, larger):
    """Held-out KL before, from whole rows in float64: 16 tokens of the teacher's and all others together."""
    base, total, count = tiny.tiny_base(), 0.0, 0
    for row in TrajectoryStore.open(imitated[1] / "trajectories").load():
        if row.split != "held_out":
            continue
        e = example_from_response(
            base.tokenizer, kind="bake", prompt=tiny.PROMPT, messages=row.stimulus, response_ids=row.response_ids
        )
        ids = [np.concatenate([prefix, e.tail]) for prefix in (e.teacher_prefix, e.student_prefix)]
        p, q = (
            log_probs(who, x)[-e.tail.size - 1 : -1].astype(np.float64)
            for who, x in zip((larger, base), ids, strict=True)
        )
        top = np.argsort(-p, axis=-1)[:, :16]
        p, q = (np.take_along_axis(x, top, -1) for x in (p, q))
        p, q = (np.concatenate([x, np.log1p(-np.exp(x).sum(-1, keepdims=True))], -1) for x in (p, q))
        total, count = total + (np.exp(p) * (p - q)).sum(), count + e.tail.size
    assert imitated[0].kl_before == pytest.approx(total / count, rel=1e-4)


def test_it_is_loaded_once_and_let_go_and_a_resumed_bake_does_without(imitated, larger, monkeypatch, tmp_path):
    loads = []

    class Named(Other):
        """As when it is given by name, without the folder."""

        def __init__(self, given, base):
            super().__init__(larger, base)
            self._loaded = None

    let_go = []
    monkeypatch.setattr(room, "load", lambda name, **_: loads.append(name) or larger)
    monkeypatch.setattr(Named, "let_go", lambda self: (let_go.append(self.name), Other.let_go(self)))
    monkeypatch.setattr("jaxbake.bake.loop.Other", Named)

    class Killed(Exception):
        pass

    def kill(stage, done, total, info):
        if stage == "bake" and done == 7:
            raise Killed

    config = replace(CONFIG, teacher=TeacherConfig(model="larger", top_k=16))
    with pytest.raises(Killed):
        tiny.tiny_bake(tmp_path / "a", config, progress=kill)
    assert loads == let_go == ["larger"]
    result = tiny.tiny_bake(tmp_path / "a", config)
    assert loads == ["larger"]  # what it said was in the folder
    assert delta_digest(result.delta) == delta_digest(imitated[0].delta)
    assert tiny.tiny_bake(tmp_path / "a", config).reused
    with pytest.raises(JaxbakeError, match="holds another bake.*teacher"):
        tiny.tiny_bake(tmp_path / "a")


def test_a_teacher_that_cannot_be_one_is_refused(larger, tmp_path):
    base = tiny.tiny_base()
    renamed = tiny.tokenizer()
    renamed.add_tokens(["<new>"])
    for changes, said in (
        ({"tokenizer": None}, "larger has no tokenizer"),
        (
            {"tokenizer": renamed},
            r"larger has another vocabulary than tiny \(263 tokens and 262; '<new>' is 262 there",
        ),
        ({"config": replace(LARGER, vocab_size=200)}, "has tokens that its model or tiny has no logits for"),
    ):
        with pytest.raises(JaxbakeError, match=said):
            Other(replace(larger, **changes), base)
    with pytest.raises(JaxbakeError, match="ends a response with '<end>', after which tiny would go on"):
        Other(larger, replace(base, eos_ids=(1,)))
    with pytest.raises(JaxbakeError, match="no such folder"):
        tiny.tiny_bake(None, replace(CONFIG, teacher=TeacherConfig(model="nothing here")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(JaxbakeError, match="no config.json"):
        Other(str(tmp_path / "empty"), base)
    with pytest.raises(JaxbakeError, match="teacher.top_k: 0"):
        TeacherConfig(top_k=0)


def test_a_teacher_in_a_folder_is_known_before_it_is_read(monkeypatch, tmp_path):
    """crumb by name: digest and tokenizer at once, weights on demand, in the base's dtype."""
    crumb = room.load("crumb")
    other = Other("crumb", crumb)
    assert other.digest == crumb.digest and other.config == crumb.config
    loaded = other.load()
    assert loaded is other.load() and loaded.params["norm"].dtype == crumb.params["norm"].dtype
    other.let_go()
    assert other.load() is not loaded


def test_it_teaches_many_at_once_as_each_alone(larger):
    specs = [
        BakeSpec(name, prompt, tiny.STIMULI, replace(CONFIG, seed=seed), pins=tiny.PINS, contexts=tiny.CONTEXTS)
        for name, prompt, seed in (("sailor", tiny.PROMPT, 0), ("king", "Be a king.", 5))
    ]
    for spec, got in zip(specs, bake_many(tiny.tiny_base(), specs, teacher=larger), strict=True):
        want = tiny.tiny_bake(None, spec.config, prompt=spec.prompt, teacher=larger)
        for a, b in zip(jax.tree.leaves(got.delta), jax.tree.leaves(want.delta), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        np.testing.assert_allclose([got.kl_before, got.kl_after], [want.kl_before, want.kl_after], rtol=1e-5)
        assert (got.card.teacher, got.card.teacher_digest) == ("larger", "digest of larger")
    none = replace(CONFIG.train, teacher_device_gb=0, teacher_host_gb=0)
    cramped = [specs[0], replace(specs[1], config=replace(specs[1].config, train=none))]
    with pytest.raises(JaxbakeError, match="king: what its teacher says takes .* GiB, and there is no such room"):
        bake_many(tiny.tiny_base(), cramped, teacher=larger)
