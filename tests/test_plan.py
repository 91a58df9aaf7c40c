"""Plans: what is read from a compiled program's text, the products counted in a jaxpr, the search for what fits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from jaxbake.cli import app
from jaxbake.config import BakeConfig
from jaxbake.errors import JaxbakeError
from jaxbake.plan import Case, Figures, Memory, Plan, Request, Sizes, make_plan, request_for
from jaxbake.plan import search as searching
from jaxbake.plan.chips import CHIPS, parse_topology
from jaxbake.plan.flops import matmul_flops
from jaxbake.plan.hlo import Traffic, group_size, read_costs, split_operation, type_bytes
from jaxbake.plan.search import others

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the plan extra (libtpu)")
GIB = 1 << 30

HLO = (Path(__file__).parent / "golden" / "loops.hlo.txt").read_text()


def test_costs_of_a_compiled_program():
    """Loops in loops, one that starts at 4 and goes by twos, one without a known end, a collective in three parts."""
    costs = read_costs(HLO)
    rounds = 3  # 4, 6, 8
    assert costs.cycles == rounds * (100 + 5 + 3 * 10) + 7 + 1000 + 1
    assert costs.open_loops == 1
    assert costs.unestimated == rounds
    assert costs.collectives == {
        "all-gather": Traffic(rounds, rounds * 64 * 256 * 2),
        "reduce-scatter": Traffic(2, 64 * 8 * 4 + 2 * 2 * 8 * 4),
    }
    assert costs.waiting == Traffic(1, 2 * 2 * 8 * 4)


def test_a_known_trip_count_is_taken():
    text = HLO.replace("body=%open_body", 'body=%open_body, backend_config={"known_trip_count":{"n":"6"}}')
    assert read_costs(text).cycles == read_costs(HLO).cycles + 5 * 1000
    assert read_costs(text).open_loops == 0


def test_hand_written_kernels_count_what_they_declare():
    assert read_costs(HLO).kernel_flops == 0
    said = (
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"4096",'
    )
    text = HLO.replace('custom_call_target="tpu_custom_call"', said + '"transcendentals":"1"}}}')
    assert read_costs(text).kernel_flops == 3 * 4096
    assert read_costs(text).cycles == read_costs(HLO).cycles


def test_parts_of_the_text():
    operation = "(f32[2]{0:T(8,128)S(1)}, /*index=1*/(u32[])) fusion(%a, %b.1), kind=kLoop, calls=%c"
    assert split_operation(operation) == (
        "(f32[2]{0:T(8,128)S(1)}, (u32[]))",
        "fusion",
        "%a, %b.1",
        ", kind=kLoop, calls=%c",
    )
    assert type_bytes("(bf16[4,8]{1,0}, f8e4m3fn[4,100], pred[])") == 400
    assert type_bytes("s4[16]") == 8
    assert group_size("replica_groups={{0,1,2,3}}") == 4
    assert group_size("replica_groups=[2,8]<=[16]") == 8
    with pytest.raises(JaxbakeError, match="no ENTRY"):
        read_costs("not a module")


def test_matmul_flops_of_a_jaxpr():
    """Scans multiplied out, branches by the dearest, recomputation counted again."""
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    one = 2 * 4 * 8 * 8
    layers = jnp.ones((5, 8, 8))

    def deep(x, layers):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, layers)[0].sum()

    assert matmul_flops(jax.make_jaxpr(deep)(x, layers)) == 5 * one
    assert matmul_flops(jax.make_jaxpr(jax.grad(deep, (0, 1)))(x, layers)) == 5 * 4 * one
    both = jax.make_jaxpr(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w))(x, w)
    assert matmul_flops(both) == 2 * one
    batched = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(jnp.ones((3, 4, 8)), jnp.ones((3, 8, 2)))
    assert matmul_flops(batched) == 2 * 3 * 4 * 8 * 2
    looped = jax.make_jaxpr(lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x))(x, w)
    assert matmul_flops(looped) == one


def test_kernels_count_what_they_say():
    """A hand-written kernel's products times its grid, or its own estimate."""
    from jax.experimental import pallas as pl

    def product(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    def kernel(x, **options):
        return pl.pallas_call(product, jax.ShapeDtypeStruct((8, 8), jnp.float32), grid=(3,), **options)(x)

    x = jnp.ones((8, 8))
    assert matmul_flops(jax.make_jaxpr(kernel)(x)) == 3 * 2 * 8**3
    said = pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0)
    both = jax.make_jaxpr(lambda x: kernel(x, cost_estimate=said) @ x)(x)
    assert matmul_flops(both) == 7 + 2 * 8**3


def test_chips_and_topologies():
    peaks = {name: chip.flops_per_cycle * chip.hertz for name, chip in CHIPS.items()}
    assert {name: round(peak / 1e12) for name, peak in peaks.items()} == {"v5e": 197, "v5p": 459, "v6e": 918}
    assert parse_topology("v5p:2x2x4", 3).total == 48
    for text, says in (("v5:4x4", "no TPU 'v5'"), ("v5e:4", "2 sizes"), ("v5p:4x4", "3 sizes"), ("v5e", "2 sizes")):
        with pytest.raises(JaxbakeError, match=says):
            parse_topology(text)
    with pytest.raises(JaxbakeError, match="slices"):
        parse_topology("v5e:4x4", 0)


def test_requests(tmp_path):
    """From a folder or a bare config.json, with sizes of the recipe or of the flags; through JSON and back."""
    fields = {"model_type": "llama", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    request = request_for("v5e:4x4", model=str(tmp_path), rows=8, prompt=0)
    assert request.model == fields and request.sizes == Sizes(rows=8, prompt=0)
    assert request.bake.train.remat and request.bake.lora.rank == 32
    assert request_for("v5e:4x4", model=str(tmp_path / "config.json")).model == fields
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request_for("v5e:2x2", model="crumb").model["model_type"]
    (tmp_path / "other.json").write_text("{}")
    for model, says in (
        (str(tmp_path / "missing.json"), "no such folder or config.json"),
        (str(tmp_path / "other.json"), "no 'model_type'"),
        (None, "give a recipe, or --model"),
    ):
        with pytest.raises(JaxbakeError, match=says):
            request_for("v5e:4x4", model=model)
    with pytest.raises(JaxbakeError, match="rows is 0"):
        request_for("v5e:4x4", model=str(tmp_path), rows=0)


def case(peak: float, mesh="fsdp=4", micro_batches=1, remat=True, program="online") -> Case:
    """One program that needs `peak` GiB of 16, of which 4 are weights."""
    memory = Memory(4 * GIB, 0, 0, 16 * GIB, int(peak * GIB))
    return Case(mesh, micro_batches, remat, (Figures(program, memory, 1.0, 10**12, 10**6, cycles=2 * 10**6),))


REQUEST = Request("m", {}, "v5e:2x2", mesh="fsdp=4", sizes=Sizes(rows=32), bake=BakeConfig())


def tried(request: Request, asked: Case) -> list[tuple]:
    return [(r.mesh, r.bake.optimizer.accumulate, r.bake.train.remat) for r in others(request, asked)]


def test_what_is_tried_where_it_does_not_fit():
    """First recomputation, then as many micro-batches as the overshoot asks for, then all of them, then tp."""
    assert tried(REQUEST, case(20, remat=False))[0] == ("fsdp=4", 1, True)
    assert tried(REQUEST.with_remat(), case(40)) == [
        ("fsdp=4", 4, True), ("fsdp=4", 8, True),
        ("fsdp=2,tp=2", 1, True), ("fsdp=2,tp=2", 4, True), ("fsdp=2,tp=2", 16, True),
        ("tp=4", 1, True), ("tp=4", 4, True), ("tp=4", 32, True),
    ]  # fmt: skip


def plan_with(monkeypatch, peaks: dict, request: Request = REQUEST, **options) -> Plan:
    """A plan whose cases need so many GiB, by (mesh, micro-batches, recomputation)."""

    def compile_elsewhere(request):
        at = request.mesh, request.bake.optimizer.accumulate, request.bake.train.remat
        if peaks.get(at, 99) is None:
            raise JaxbakeError("tp does not divide the heads")
        return case(peaks.get(at, 99), *at), 7

    monkeypatch.setattr(searching, "check_compiler", lambda: None)
    monkeypatch.setattr(searching, "compile_elsewhere", compile_elsewhere)
    return make_plan(replace(request, programs=("online",)), **options)


def test_a_plan_that_fits(monkeypatch):
    plan = plan_with(monkeypatch, {("fsdp=4", 1, False): 15})
    assert plan.asked.fits and plan.best is plan.asked and plan.tried == ()
    told = plan.to_dict()
    assert told["fits"] and told["suggestion"] is None
    assert told["asked"]["programs"][0]["bound_share"] == 0.5


def test_a_plan_that_misses_suggests_what_fits(monkeypatch):
    said = []
    fits = ("fsdp=4", 4, True)
    plan = plan_with(monkeypatch, {("fsdp=4", 1, False): 30, ("fsdp=4", 1, True): 18, fits: 11}, say=said.append)
    assert not plan.asked.fits and plan.asked["online"].memory.over == 14 * GIB
    assert (plan.best.mesh, plan.best.micro_batches, plan.best.remat) == fits and len(plan.tried) == 2
    assert plan.to_dict()["suggestion"]["fits"]
    assert said[1].startswith("online misses by 14.00 GiB a chip; trying mesh fsdp=4")


def test_a_mesh_that_cannot_be_is_passed_over(monkeypatch):
    said, cannot = [], {("fsdp=2,tp=2", count, True): None for count in (1, 16)}
    peaks = {**cannot, ("tp=4", 1, True): 15}
    plan = plan_with(monkeypatch, peaks, REQUEST.with_remat(), tries=9, say=said.append)
    assert plan.best.mesh == "tp=4" and len(plan.tried) == 2
    assert said.count("tp does not divide the heads") == 2


def test_a_plan_for_which_nothing_fits(monkeypatch):
    plan = plan_with(monkeypatch, {("fsdp=4", 8, True): 17}, REQUEST.with_remat(), tries=3)
    assert plan.best is None and len(plan.tried) == 3
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan)
    assert "Nothing that fits was found in 3 tries; the nearest, mesh fsdp=4" in capture.get()
    assert "misses by 1.00 GiB a chip" in capture.get()


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch):
    run = CliRunner().invoke
    for arguments, says in (
        (["plan"], "give a recipe, or --model"),
        (["plan", "--model", "crumb", "--set", "a=b"], "--set changes a recipe"),
        (["plan", "--model", "crumb", "--topology", "v9:2x2"], "no TPU 'v9'"),
    ):
        result = run(app, arguments)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(app, ["plan", "--model", "crumb"])
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("install it with: pip install 'jaxbake[plan]'")


@needs_compiler
def test_any_mesh_lies_on_any_slice():
    """Also where two of its axes share a side of the torus; in a process that knows TPUs."""
    script = """
from jax.experimental import topologies
from jaxbake.mesh import make_mesh
for topology, mesh in ("v6e:4x4", "fsdp=8,tp=2"), ("v5p:4x4x4", "fsdp=32,tp=2"), ("v5e:2x4", "fsdp=2,context=2,tp=2"):
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    assert set(make_mesh(mesh, devices).devices.flat) == set(devices)
"""
    environment = {**os.environ, **searching.ENVIRONMENT}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.slow
def test_a_tiny_model_compiles_for_a_tpu(tmp_path):
    """The real programs, the real compiler: memory, cycles and collectives; and a case that misses."""
    fields = dict(
        model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=4096, rms_norm_eps=1e-6,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    request = request_for(
        "v5e:2x2", model=str(tmp_path), mesh="fsdp=2,tp=2", rows=8, question=32, response=96, prompt=128
    )
    request = replace(request, programs=("cached", "decode"))
    plan = make_plan(request)
    assert plan.asked.mesh == "fsdp=2,tp=2" and plan.asked.fits
    cached, decode = (plan.asked[name] for name in request.programs)
    weights = 2 * plan.parameters
    for f in (cached, decode):
        assert weights / 4 <= f.memory.weights < weights / 2  # norms, and little else, are whole on each chip
        assert f.memory.peak > f.memory.weights and f.cycles > f.bound > 0
        assert sum(kind["count"] for kind in f.collectives.values()) > 3
    assert cached.cycles > decode.cycles
    per_token = 2 * (plan.parameters - 512 * 256)  # a multiplication for each weight but the input embedding's
    assert decode.flops == pytest.approx(decode.tokens * per_token, rel=0.3)
    endless = replace(request, programs=("decode",), sizes=replace(request.sizes, prompt=2**26))
    missed = make_plan(endless, tries=0)
    assert not missed.asked.fits and missed.asked["decode"].memory.over > GIB and missed.best is None


def test_growth_is_tabulated(monkeypatch):
    """Each size with both steps; the case itself in every table; what one more costs, from line to line."""
    monkeypatch.syspath_prepend(str(ROOT / "tpu_scripts"))
    import growth

    base = request_for("v5e:2x2", model="crumb", mesh="fsdp=4")
    points = list(growth.points(replace(base, model={**base.model, "vocab_size": 128_256})))
    assert len(points) == 18 and sum(not point.name for point in points) == 6
    assert {point.request.model["vocab_size"] for point in points if point.what == "vocabulary"} == {
        32_000, 128_256, 256_000,
    }  # fmt: skip
    memory = Memory(weights=1, state=1, inputs=1, hbm=16 * GIB, peak=GIB)
    done = [
        (point, Case("fsdp=4", 1, True, (Figures("online", memory, 1.0, 4 << 20, 1000, 7 * point.value + 5),)))
        for point in points
    ]
    text = growth.page(base, "crumb", "no compiler", done)
    lines = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(lines) == 18
    assert [line[5] for line in lines] == ["-", "7", "7"] * 6
