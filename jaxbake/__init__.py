"""Prompt baking in JAX: a low-rank delta that makes the unprompted model behave as the prompted one.

    import jaxbake as jb
    base = jb.load("crumb")
    result = jb.bake(base, prompt="You are a pirate.", stimuli=["hello.", "who are you?"])
    jb.sample(base, "hello.", delta=result.delta)

Names are imported when they are first used, so `import jaxbake` is quick and loads no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Base": "models.base",
    "BakeConfig": "config",
    "BakeResult": "bake.loop",
    "BakeState": "bake.step",
    "Card": "bakery.card",
    "Delta": "deltas.lora",
    "EvaluationConfig": "config",
    "GenerateConfig": "config",
    "JaxbakeError": "errors",
    "LoraConfig": "config",
    "LossConfig": "config",
    "ModelConfig": "models.spec",
    "OptimizerConfig": "config",
    "Recipe": "config",
    "RetentionConfig": "config",
    "SamplingConfig": "config",
    "StimuliConfig": "config",
    "TrainConfig": "config",
    "check_vllm": "deltas.vllm",
    "forward": "models.decoder",
    "fused_kl": "objectives",
    "init_delta": "deltas.lora",
    "load": "models.base",
    "load_delta": "bakery.store",
    "load_peft": "deltas.peft",
    "load_recipe": "recipe",
    "logits": "models.base",
    "make_bake_step": "bake.step",
    "make_eval_step": "bake.step",
    "make_optimizer": "bake.step",
    "merge": "deltas.merged",
    "run_recipe": "run",
    "sample": "sampling",
    "save_delta": "bakery.store",
    "save_merged": "deltas.merged",
    "save_peft": "deltas.peft",
    "stream": "sampling",
}
"""Every public name, and the module it lives in."""

__all__ = sorted([*_HOME, "bake"])  # noqa: PLE0605


def __getattr__(name: str):
    if name == "bake":  # the room and the function in one: see jaxbake/bake/__init__.py
        return importlib.import_module("jaxbake.bake")
    if name not in _HOME:
        raise AttributeError(f"module 'jaxbake' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"jaxbake.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
