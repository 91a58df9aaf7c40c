"""The commands: what they teach, how they refuse, and that JSON comes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpu_seconds import cpu_seconds
from typer.testing import CliRunner

from jaxbake.cli import app
from jaxbake.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
COMMANDS = [
    "quickstart", "bake", "sample", "chat", "eval", "merge", "export peft", "export merged", "check vllm", "models",
    "bench step", "bench kl", "bench sample", "bench load", "bench many", "bench compare", "plan",
    "bake-many", "quantize-report",
]  # fmt: skip


def call(*args: str | Path, code: int = 0, text: str | None = None):
    """Runs a command in this process; its standard output and error, kept apart."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(arg) for arg in args], input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def refused(*args: str | Path) -> str:
    """The one line a command leaves with, where what it was given is wrong."""
    result = call(*args, code=2)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("jaxbake: ")
    return lines[0].removeprefix("jaxbake: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command):
    text = call(*command.split(), "--help").stdout
    assert f"jaxbake {command}" in text and "Example" in text


def test_root_help_names_every_command():
    text = call("--help").stdout
    assert "jaxbake quickstart" in text
    for command in COMMANDS:
        assert command.split()[0] in text
    assert {name.split()[0] for name in COMMANDS} == {
        *(c.name or c.callback.__name__ for c in app.registered_commands),
        *(g.name for g in app.registered_groups),
    }


def test_help_is_quick():
    code = "import sys; from jaxbake.cli import main; sys.argv = ['jaxbake', '--help']; main()"
    assert min(cpu_seconds(code) for _ in range(2)) < 1.0


def test_version():
    import jaxbake

    assert call("--version").stdout.strip() == jaxbake.__version__


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("name: a\nprompt: b\nbake: {lora: {rnak: 8}}\n", "did you mean 'bake.lora.rank'?"),
        ("name: a\nprompt: b\nbake: {lora: {rank: 0}}\n", "bake.lora.rank: 0 is not a rank"),
        ("name: a\nprompt: ''\n", "prompt: is empty"),
        ("name: a\nprompt_file: none.txt\n", "none.txt' cannot be read"),
    ],
)
def test_bad_recipe_is_one_line(tmp_path, recipe, said):
    path = tmp_path / "r.yaml"
    path.write_text(recipe)
    assert said in refused("bake", path)


def test_bad_override_and_missing_recipe(tmp_path):
    assert "no such recipe" in refused("bake", tmp_path / "none.yaml")
    assert "write it as field=value" in refused("bake", CONFIGS / "persona.yaml", "--set", "rank")


def test_wrong_model_or_folder_is_one_line(tmp_path):
    assert "no such folder" in refused("sample", "./nowhere", "--user", "hello")
    assert "nowhere" in refused("export", "peft", tmp_path / "nowhere", tmp_path / "out")
    assert "nowhere" in refused("check", "vllm", tmp_path / "nowhere")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\nprompt: b\nmodel: ./nowhere\nstimuli: {items: [c]}\n")
    assert "no such folder" in refused("bake", recipe, "--output", tmp_path / "out")


def test_usage_errors_say_what_is_missing():
    assert "user" in call("sample", "crumb", code=2).stderr
    assert "No such option" in call("bake", "--nonsense", code=2).stderr


def test_models_as_json():
    from jaxbake.models.families import FAMILIES

    rows = json.loads(call("models", "--json").stdout)
    assert [row["model_type"] for row in rows] == list(FAMILIES)
    table = call("models").stdout
    assert all(row["family"] in table for row in rows)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for name in (recipe.stimuli.file, recipe.evaluation.file):
        assert name is None or (path.parent / name).is_file()
    if recipe.stimuli.file:
        assert recipe.evaluation.file, "a recipe that can be checked should be"
        asked = {line.strip() for line in (path.parent / recipe.stimuli.file).read_text().splitlines()}
        questions = [json.loads(line) for line in (path.parent / recipe.evaluation.file).read_text().splitlines()]
        assert not asked & {item["question"] for item in questions}, "evaluation must not ask what was trained on"


def test_quickstart_ships_its_recipe():
    from jaxbake.run import QUICKSTART

    names = ("quickstart.yaml", "quickstart_stimuli.txt", "quickstart_questions.jsonl")
    assert QUICKSTART.name == names[0]
    for name in names:
        assert (QUICKSTART.parent / name).read_bytes() == (CONFIGS / name).read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model of one layer with crumb's tokenizer, as a Hugging Face folder."""
    import shutil

    import torch
    import transformers

    from jaxbake.smallworld import CRUMB

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CRUMB / name, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "prompt.txt").write_text("You are a pirate.\n")
    (folder / "stimuli.txt").write_text("Hello.\nWho are you?\nWhat is 2 + 3?\nCount from 1 to 4.\n")
    (folder / "questions.jsonl").write_text('{"question": "How are you?", "answer": "fine"}\n')
    path = folder / "tiny.yaml"
    path.write_text(
        f"name: tiny\nmodel: {model}\nprompt_file: prompt.txt\nstimuli: {{file: stimuli.txt}}\n"
        "evaluation: {file: questions.jsonl, max_tokens: 4}\n"
        "bake:\n  lora: {rank: 2, alpha: 4}\n  sampling: {samples_per_stimulus: 1, max_tokens: 4, batch_size: 8}\n"
        "  retention: {pins: 0.2, contexts: 0}\n"
        "  train: {steps: 2, batch_size: 4, held_out: 0.25, eval_every: 1, checkpoint_every: 1}\n"
    )
    return path


@pytest.fixture(scope="module")
def baked(recipe, tmp_path_factory):
    """The output folder of a bake through the command line, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, call("bake", recipe, "--output", folder, "--json")


def test_bake_writes_everything(baked):
    folder, result = baked
    summary = json.loads(result.stdout)
    for name in ("recipe.yaml", "metrics.jsonl", "evaluation.json", "summary.md", "plot.png", "delta", "peft"):
        assert (folder / name).exists(), name
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((folder / "evaluation.json").read_text())
    assert {name: kept[name] for name in summary} == summary
    assert "baking: 2/2" in result.stderr and "sampling" in result.stderr


def test_bake_again_is_done_already(baked, recipe):
    folder, first = baked
    before = (folder / "delta" / "card.json").read_bytes()
    result = call("bake", recipe, "--output", folder)
    assert "already holds this bake" in result.stderr
    assert (folder / "delta" / "card.json").read_bytes() == before


def test_bake_from_its_own_folder_is_the_same(baked, tmp_path):
    """The recipe kept beside a bake stands on its own: baked again elsewhere it gives the same delta."""
    folder, _ = baked
    call("bake", folder / "recipe.yaml", "--output", tmp_path / "again")
    first, again = (json.loads((f / "delta" / "card.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["delta_digest"] == again["delta_digest"]


def test_bake_refuses_a_folder_of_another(baked, recipe):
    folder, _ = baked
    assert "another bake" in refused_after_progress("bake", recipe, "--set", "bake.lora.rank=1", "--output", folder)


def test_bake_many_writes_each_as_bake_does(baked, recipe, tmp_path):
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("name: tiny", "name: other").replace("rank: 2", "rank: 1"))
    done = call("bake-many", recipe, other, "--output", tmp_path, "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["tiny", "other"]
    assert "baking: 2/2" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tiny"]
    alone = {path.name for path in baked[0].iterdir()} - {"checkpoints"}
    assert alone <= {path.name for path in (tmp_path / "tiny").iterdir()}
    single, many = (
        json.loads((f / "evaluation.json").read_text())["fidelity"]["kl_after"] for f in (baked[0], tmp_path / "tiny")
    )
    assert many == pytest.approx(single, rel=1e-4)
    again = call("bake-many", recipe, other, "--output", tmp_path)
    assert again.stderr.count("already holds this bake") == 2
    mixed = recipe.with_name("mixed.yaml")
    mixed.write_text(recipe.read_text().replace("name: tiny", "name: mixed\nquantize: int8"))
    assert "quantize: must be the same" in refused("bake-many", recipe, mixed, "--output", tmp_path)


def test_bake_over_integers(model, recipe, tmp_path):
    result = call("bake", recipe, "--set", "quantize=int8", "--output", tmp_path / "q", "--json")
    assert json.loads(result.stdout)["name"] == "tiny"
    assert "The model was held as int8" in (tmp_path / "q" / "summary.md").read_text()
    said = call("sample", model, "--delta", tmp_path / "q", "--quantize", "int8", "--user", "Hi", "--max-tokens", 2)
    assert said.stdout


def refused_after_progress(*args) -> str:
    return call(*args, code=2).stderr.strip().splitlines()[-1]


def test_sample(model, baked):
    folder, _ = baked
    answers = json.loads(call("sample", model, "-u", "Hello.", "-u", "Who?", "--max-tokens", 3, "--json").stdout)
    assert [row["user"] for row in answers] == ["Hello.", "Who?"]
    plain = call("sample", model, "--user", "Hello.", "--max-tokens", 3, "--delta", folder).stdout
    assert plain.endswith("\n")
    assert "temperature" in refused("sample", model, "--user", "Hello.", "--temperature", -1)


def test_chat(model, baked):
    folder, _ = baked
    said = "Hello.\n/system You are a cat.\nWho?\n/reset\n/what\n/quit\nnever said\n"
    result = call("chat", model, "--delta", folder, "--max-tokens", 3, text=said)
    assert "(system prompt: You are a cat.)" in result.stderr
    assert result.stderr.count("/quit leaves") == 2  # at the start, and after a command it does not know
    assert result.stdout.count("\n") == 2


def test_export_check_and_merge(model, baked, tmp_path):
    folder, _ = baked
    call("export", "peft", folder, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    findings = json.loads(call("check", "vllm", tmp_path / "peft", "--json").stdout)
    assert {"severity", "field", "message", "fix"} <= set(findings[0])
    assert all(finding["severity"] == "note" for finding in findings)
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    assert "refused" in call("check", "vllm", tmp_path / "peft", code=1).stdout
    call("merge", model, folder, tmp_path / "merged")
    call("export", "merged", folder, tmp_path / "exported")
    merged, exported = (
        json.loads(call("sample", tmp_path / name, "--user", "Hello.", "--max-tokens", 3, "--json").stdout)
        for name in ("merged", "exported")
    )
    assert merged == exported


def test_delta_of_another_base_is_refused(baked, model, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    folder, _ = baked
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert "not on" in refused("sample", tmp_path / "other", "--user", "Hello.", "--delta", folder)


def test_eval_of_a_bake_and_of_a_model(baked, model, recipe):
    folder, result = baked
    again = json.loads(call("eval", folder, "--json").stdout)
    assert again["cells"] == json.loads(result.stdout)["cells"]
    questions = recipe.parent / "questions.jsonl"
    measured = json.loads(call("eval", model, "--delta", folder, "--questions", questions, "--json").stdout)
    assert measured["questions"] == 1
    assert "--questions" in refused("eval", model)
