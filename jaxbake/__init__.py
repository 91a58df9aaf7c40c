"""Prompt baking in JAX: a low-rank delta that makes the unprompted model behave as the prompted one.

    import jaxbake as jb
    base = jb.load("crumb")
    result = jb.bake(base, prompt="You are a pirate.", stimuli=["hello.", "who are you?"])
    jb.sample(base, "hello.", delta=result.delta)

Names are imported when they are first used, so `import jaxbake` is quick and loads no jax.
"""

# ruff: noqa: F401
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names for editors and type checkers
    from jaxbake.bake.loop import bake
    from jaxbake.bake.many.loop import BakeSpec, bake_many
    from jaxbake.bake.quantisation import QuantisationReport, quantisation_report
    from jaxbake.bake.result import BakeResult
    from jaxbake.bake.step import BakeState, make_bake_step, make_eval_step, make_optimizer
    from jaxbake.bakery.card import Card
    from jaxbake.bakery.store import load_delta, save_delta
    from jaxbake.config import (
        BakeConfig,
        EvaluationConfig,
        GenerateConfig,
        LoraConfig,
        LossConfig,
        OptimizerConfig,
        Recipe,
        RetentionConfig,
        SamplingConfig,
        StimuliConfig,
        TeacherConfig,
        TrainConfig,
    )
    from jaxbake.deltas.lora import Delta, init_delta
    from jaxbake.deltas.many import Deltas
    from jaxbake.deltas.merged import merge, save_merged
    from jaxbake.deltas.peft import load_peft, save_peft
    from jaxbake.deltas.vllm import check_vllm
    from jaxbake.errors import JaxbakeError
    from jaxbake.mesh import mesh
    from jaxbake.models.base import Base, load, logits
    from jaxbake.models.decoder import forward
    from jaxbake.models.spec import ModelConfig
    from jaxbake.objectives import Moments, TopK, fused_kl, moments_of, top_k_of
    from jaxbake.recipe import load_recipe
    from jaxbake.run import run_recipe
    from jaxbake.sampling import sample, stream

_MODULES = {
    "bake.many.loop": "BakeSpec bake_many",
    "bake.quantisation": "QuantisationReport quantisation_report",
    "bake.result": "BakeResult",
    "bake.step": "BakeState make_bake_step make_eval_step make_optimizer",
    "bakery.card": "Card",
    "bakery.store": "load_delta save_delta",
    "config": "BakeConfig EvaluationConfig GenerateConfig LoraConfig LossConfig "
    "OptimizerConfig Recipe RetentionConfig SamplingConfig StimuliConfig TeacherConfig TrainConfig",
    "deltas.lora": "Delta init_delta",
    "deltas.many": "Deltas",
    "deltas.merged": "merge save_merged",
    "deltas.peft": "load_peft save_peft",
    "deltas.vllm": "check_vllm",
    "errors": "JaxbakeError",
    "models.base": "Base load logits",
    "models.decoder": "forward",
    "models.spec": "ModelConfig",
    "objectives": "Moments TopK fused_kl moments_of top_k_of",
    "recipe": "load_recipe",
    "run": "run_recipe",
    "sampling": "sample stream",
}
"""The public names of each module."""

_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

_ROOMS = ("bake", "mesh")
"""Rooms that are functions too: see jaxbake/bake/__init__.py."""

__all__ = sorted([*_HOME, *_ROOMS])


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"jaxbake.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jaxbake' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"jaxbake.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
