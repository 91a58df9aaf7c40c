"""Benchmarks count what they say they count, and compare what was asked for."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxbake.bench import compare
from jaxbake.bench.flops import matmul_flops
from jaxbake.bench.parts import bench_kl, bench_load, bench_sample
from jaxbake.bench.shape import model_config, necessary_flops, random_params
from jaxbake.bench.sizes import SIZES, Shape, make_shape
from jaxbake.bench.step import bench_step, make_examples
from jaxbake.cli import app
from jaxbake.data.batches import Batches
from jaxbake.errors import JaxbakeError
from jaxbake.models.spec import abstract_params

TINY = Shape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=96, prompt_len=20, question_len=8,
             response_len=16, batch=4)  # fmt: skip


@pytest.mark.parametrize(
    "size, cached, gflop",
    [("S", False, 19.0), ("S", True, 14.0), ("M", False, 305), ("M", True, 234), ("L", True, 512)],
)
def test_necessary_work_of_the_known_sizes(size, cached, gflop):
    shape = SIZES[size]
    assert necessary_flops(model_config(shape), shape, 16, cached=cached) / 1e9 == pytest.approx(gflop, rel=4e-3)


def test_products_are_counted_loops_multiplied_out_and_the_unused_left_out():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))

    def f(a, b):
        def turn(x, _):
            unused = b @ b
            return x @ b, unused

        out, _ = jax.lax.scan(turn, a, None, length=7)
        return jax.jit(lambda x: jnp.einsum("ij,kj->ik", x, b))(out)

    assert matmul_flops(f, a, b) == 8 * 2 * 3 * 5 * 5


def test_random_parameters_are_those_of_the_model():
    config = model_config(TINY)
    drawn = random_params(config, "float32", 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(config)
    )
    assert np.std(drawn["lm_head"]) == pytest.approx(config.init_range, rel=0.05)


@pytest.fixture
def quick(monkeypatch):
    """The machine's peak is not measured: that takes longer than all the rest."""
    for module in ("step", "parts"):
        monkeypatch.setattr(f"jaxbake.bench.{module}.peak_flops", lambda dtype: 1e12)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("online", [False, True])
def test_a_step_is_measured(online):
    out = bench_step(model_config(TINY), TINY, rank=4, steps=2, warmup=1, online=online)
    json.dumps(out)
    assert out["timed_steps"] == 2 and out["median_step_s"] > 0 and np.isfinite(out["loss"])
    assert out["response_tokens_per_s"] == pytest.approx(64 / out["median_step_s"])
    assert out["useful_fraction"] == 1
    # Attention over whole rows rather than its causal half, and computed twice, is most of what is done beyond need.
    assert out["necessary_gflop"] < out["matmul_gflop"] < 1.5 * out["necessary_gflop"]


def test_mixed_lengths_waste_little():
    shape = make_shape("M", {"vocab": 500, "batch": 16})
    prompt, examples = make_examples(model_config(shape), shape, 0, mixed=True)
    lengths = {e.tail.size for e in examples}
    assert len(lengths) > 40
    batches = Batches(examples, prompt, batch_size=16, max_length=640, seed=0)
    assert batches.useful_fraction() >= 0.9
    assert len(batches.shapes) <= 4


@pytest.mark.usefixtures("quick")
def test_the_parts_are_measured():
    config = model_config(TINY)
    for plain in (False, True):
        assert bench_kl(config, TINY, steps=1, warmup=1, plain=plain)["tokens_per_s"] > 0
    sampled = bench_sample(config, TINY, steps=1)
    assert sampled["tokens_per_s"] == pytest.approx(4 * 16 / sampled["median_call_s"])
    loaded = bench_load(config, steps=1)
    assert loaded["bytes"] > sum(x.size * 4 for x in jax.tree.leaves(abstract_params(config)))


def test_shapes_that_make_no_model_are_refused():
    with pytest.raises(JaxbakeError, match="--size XL"):
        make_shape("XL", {})
    with pytest.raises(JaxbakeError, match="--heads 5"):
        make_shape("S", {"heads": 5})
    with pytest.raises(JaxbakeError, match="--batch: 0"):
        make_shape("S", {"batch": 0})


def _prints(**figures) -> list[str]:
    return [sys.executable, "-c", f"print('a line {{'); print({json.dumps(json.dumps(figures))})"]


def test_commands_run_in_turn_and_their_medians_are_compared():
    commands = {
        "a": _prints(response_tokens_per_s=300.0, peak_mb=50),
        "b": _prints(student_response_tokens_per_s=100.0, peak_rss_mb=200),
    }
    seen = []
    results = compare.run(commands, 2, 1, seen.append)
    assert [line.split(": ")[1] for line in seen] == ["a", "b", "a", "b"]
    lines = [
        compare.Line("speed", "a", "b", "speed", 3.5),
        compare.Line("memory", "a", "b", "memory", 4.0),
        compare.Line("flat", "b", "a", "speed", 1.1, most=True),
    ]
    rows = compare.rows(results, lines)
    assert [row["ratio"] for row in rows] == [3.0, 4.0, pytest.approx(1 / 3)]
    assert [row["met"] for row in rows] == [False, True, True]


def test_rivals_do_not_inherit_our_huge_pages(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    show = [sys.executable, "-c", "import json, os; print(json.dumps({'set': os.environ.get('GLIBC_TUNABLES')}))"]
    assert compare.run({"a": show}, 1, 1, print)["a"] == [{"set": "glibc.malloc.hugetlb=1"}]  # the user's own wish
    monkeypatch.setenv("JAXBAKE_HUGE_PAGES", "on")
    assert compare.run({"a": show}, 1, 1, print)["a"] == [{"set": None}]


def test_a_rival_that_fails_or_prints_nothing_useful_is_named():
    with pytest.raises(JaxbakeError, match="theirs: ended with code 3"):
        compare.run({"theirs": [sys.executable, "-c", "raise SystemExit(3)"]}, 1, 1, print)
    with pytest.raises(JaxbakeError, match="printed no JSON"):
        compare.run({"theirs": [sys.executable, "-c", "print('fast')"]}, 1, 1, print)
    with pytest.raises(JaxbakeError, match="no field"):
        compare.rows({"a": [{}]}, [compare.Line("x", "a", None, "speed", None)])
    with pytest.raises(JaxbakeError, match="torch_bake.py"):
        compare.table(compare.Path("nowhere"), ["S"], python="python", threads=1, steps=1, trl=False)


def test_the_table_of_all_sizes_names_only_commands_it_runs(tmp_path):
    for name in compare.PEERS:
        (tmp_path / name).write_text("")
    commands, lines = compare.table(tmp_path, ["S", "M", "L"], python="python", threads=2, steps=3, trl=True)
    assert {name for line in lines for name in (line.ours, line.theirs) if name} == set(commands)
    assert len({line.name for line in lines}) == len(lines) >= 15


def test_the_page_names_every_command_and_no_folder_of_the_machine(tmp_path):
    for name in compare.PEERS:
        (tmp_path / name).write_text("")
    commands, lines = compare.table(tmp_path, ["M"], python="/bin/python", threads=2, steps=3, trl=False)
    figures = {"response_tokens_per_s": 8.0, "median_step_s": 0.5, "peak_mb": 100.0, "peak_rss_mb": 300.0}
    results = {name: [figures | {"share_of_peak": 0.5, "useful_fraction": 0.95, "ratio": 1.4}] for name in commands}
    page = compare.page(compare.rows(results, lines), commands, results)
    assert "| M: memory of eager / ours | 100 | 100 | 1.00 | >= 2 | NOT MET |" in page
    assert "| M: 32 deltas in one step / one delta, as many tokens | 1.4 |  | 1.40 | <= 1.3 | NOT MET |" in page
    assert "`jaxbake bench step --size M --steps 3 --json` | 8 | 0.5 | 100 |" in page
    assert "`torch_bake.py --size M --threads 2 --steps 3 --warmup 1`" in page
    assert str(tmp_path) not in page and "/bin" not in page


@pytest.mark.usefixtures("quick")
def test_bench_commands_print_json():
    arguments = "bench step --layers 1 --hidden 16 --heads 2 --kv-heads 1 --ffn 16 --vocab 50 --prompt-len 4"
    arguments += " --question-len 4 --response-len 4 --batch 2 --rank 2 --steps 1 --warmup 1 --json"
    done = CliRunner().invoke(app, arguments.split(), env={"JAX_ENABLE_COMPILATION_CACHE": None})
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["mode"] == "cached targets"
