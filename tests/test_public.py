"""The public names, and that importing them costs nothing until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from cpu_seconds import cpu_seconds

import jaxbake as jb

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "datasets", "matplotlib", "torch", "pydantic"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy():
    loaded = run("import jaxbake, sys; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "jaxbake" in loaded
    assert not HEAVY & set(loaded)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from jaxbake.cli import main; sys.argv = ['jaxbake', '--help']\n"
        "try: main()\nexcept SystemExit as leaving: assert not leaving.code\n"
        "print('loaded', *{name.split('.')[0] for name in sys.modules})"
    )
    loaded = run(code).splitlines()[-1].split()
    assert "typer" in loaded
    assert not HEAVY & set(loaded)


def test_import_is_quick():
    python = min(cpu_seconds("pass") for _ in range(2))
    assert min(cpu_seconds("import jaxbake") for _ in range(2)) - python < 0.3


def test_every_name_is_there():
    for name in jb.__all__:
        assert getattr(jb, name) is not None, name
    assert set(jb.__all__) <= set(dir(jb))


def test_type_checkers_see_the_same_names():
    text = Path(jb.__file__).read_text()
    block = text[text.index("if TYPE_CHECKING:") : text.index("_MODULES = ")]
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert sorted(alias.name for node in imports for alias in node.names) == jb.__all__


def test_the_contract():
    """The surface that was promised; more is welcome."""
    promised = """
        load bake BakeConfig LoraConfig SamplingConfig StimuliConfig RetentionConfig LossConfig OptimizerConfig
        TrainConfig forward logits sample fused_kl make_bake_step init_delta merge save_peft load_peft save_merged
        check_vllm Base Delta ModelConfig JaxbakeError load_delta load_recipe run_recipe
    """
    assert set(promised.split()) <= set(jb.__all__)


def test_bake_is_a_function_whatever_was_imported_before():
    for first in ("", "import jaxbake.bake.step;"):
        assert run(f"import jaxbake as jb; {first} print(callable(jb.bake))") == "True\n"


def test_unknown_name():
    try:
        jb.nonsense  # noqa: B018
    except AttributeError as error:
        assert "nonsense" in str(error)
    else:
        raise AssertionError("an unknown name was given out")
