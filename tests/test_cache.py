"""Compiled programs are kept where they should be; starting up imports nothing heavy."""

import os
import subprocess
import sys

import pytest

from jaxbake.cache import keep_compiled, user_folder


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE_COMPILATION", "JAXBAKE_CACHE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # as before it is imported; what it has stays as it is
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # so that what is set in a test is taken back after it
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_by_default_in_the_users_cache_folder(tmp_path):
    assert user_folder() == tmp_path / "jaxbake"
    assert keep_compiled() == os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jaxbake" / "compiled")


def test_elsewhere_or_off_where_told(monkeypatch):
    assert keep_compiled("gs://bucket/compiled") == os.environ["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/compiled"
    assert keep_compiled() == "gs://bucket/compiled"  # what jax was told stays
    monkeypatch.setenv("JAXBAKE_CACHE", "off")
    assert keep_compiled() is None and os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_from_python_a_loaded_model_is_enough_and_what_jax_was_told_stays(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "JAXBAKE_"))}
    for first, kept in (
        ("", str(tmp_path / "jaxbake" / "compiled")),
        ("jax.config.update('jax_compilation_cache_dir', 'mine')", "mine"),
    ):
        code = (
            f"import jax\n{first}\nimport jaxbake\njaxbake.load('crumb')\nprint(jax.config.jax_compilation_cache_dir)"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], check=True, env=environment | {"JAX_PLATFORMS": "cpu"}, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert out.stdout.split()[-1] == kept


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, jaxbake\n"
        "from typer.testing import CliRunner\n"
        "from jaxbake.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['bench', 'step', '--help']).exit_code == 0\n"
        "heavy = {'jax', 'numpy', 'transformers', 'datasets', 'matplotlib', 'torch', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_program_compiled_once_is_there_the_next_time(tmp_path):
    code = (
        "from jaxbake.cache import keep_compiled; keep_compiled()\n"
        "import jax, jax.numpy as jnp\n"
        "jax.jit(lambda x: jnp.linalg.qr(x @ x)[0])(jnp.ones((9, 9)))\n"
    )
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_ENABLE_COMPILATION_CACHE"):
        environment.pop(name)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert any((tmp_path / "jaxbake" / "compiled").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone gives huge pages so")
def test_heavy_commands_start_again_once_for_huge_pages(monkeypatch):
    from jaxbake import cli

    started = []
    monkeypatch.setattr(cli.os, "execve", lambda path, command, environment: started.append((command, environment)))
    monkeypatch.setattr(cli.Path, "read_text", lambda path: "always [madvise] never")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for arguments in (["--help"], ["models"]):
        monkeypatch.setattr(sys, "argv", ["jaxbake", *arguments])
        cli._with_huge_pages()
    assert not started
    monkeypatch.setattr(sys, "argv", ["jaxbake", "--cache", "off", "bake", "recipe.yaml"])
    cli._with_huge_pages()
    (command, environment) = started.pop()
    assert command == [sys.executable, *sys.orig_argv[1:]]
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    cli._with_huge_pages()
    assert not started
