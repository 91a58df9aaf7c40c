"""Writes a trained crumb as a Hugging Face folder: bfloat16 weights, configuration, tokenizer, chat template, card.

    python -m jaxbake.smallworld.export --run DIR --out DIR [--items 100]

The card's table is measured on the exported folder by `jaxbake.smallworld.evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxbake.errors import JaxbakeError
from jaxbake.models.spec import ModelConfig, Param, param_specs
from jaxbake.smallworld.tokenizer import END, PAD, SPECIAL


def read_run(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters of a training run's last checkpoint, as Hugging Face tensors by name, float32."""
    file = folder / "checkpoint" / "arrays.safetensors"
    if not file.exists():
        raise JaxbakeError(f"{file} does not exist; give the folder that was --out of jaxbake.smallworld.train")
    arrays = load_file(file)
    tensors: dict[str, np.ndarray] = {}

    def add(spec: Param, value: np.ndarray) -> None:
        if "{layer}" not in spec.hf:
            tensors[spec.hf] = value
            return
        for i, one in enumerate(value):
            tensors[spec.hf.format(layer=i)] = np.ascontiguousarray(one.T if spec.transpose else one)

    specs = param_specs(config)
    for name, spec in specs.items():
        if isinstance(spec, Param):
            add(spec, arrays[f"['params']['{name}']"])
        else:
            for leaf, inner in spec.items():
                add(inner, arrays[f"['params']['{name}']['{leaf}']"])
    return tensors


def hf_config(config: ModelConfig) -> dict:
    """`config.json` of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.ropes[0].theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.ropes[0].theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
        "dtype": "bfloat16",
    }


def write_model(tensors: dict[str, np.ndarray], config: ModelConfig, folder: Path) -> None:
    """Writes model.safetensors (bfloat16), config.json and generation_config.json, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    low = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(low, folder / "model.safetensors.new", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
    ids = {"eos_token_id": SPECIAL.index(END), "pad_token_id": SPECIAL.index(PAD)}
    for name, content in (("config.json", hf_config(config)), ("generation_config.json", ids | {"do_sample": False})):
        (folder / f"{name}.new").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(folder / f"{name}.new", folder / name)


def main() -> None:
    from jaxbake.smallworld.train import CRUMB_CONFIG

    parser = argparse.ArgumentParser(description="Export a training run of crumb as a Hugging Face folder.")
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of jaxbake.smallworld.train")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to (it holds the tokenizer already)")
    options = parser.parse_args()
    write_model(read_run(options.run, CRUMB_CONFIG), CRUMB_CONFIG, options.out)


if __name__ == "__main__":
    main()
