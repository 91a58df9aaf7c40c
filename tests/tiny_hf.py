"""Tiny random torch models saved in Hugging Face format, for parity with transformers and peft."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def save_tiny(kind: str, folder: Path):
    """Writes a random float32 model of a family ("llama", "phi3", "gemma2", "gemma3_multimodal"), returns it."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if kind == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=False))
    elif kind == "phi3":
        model = tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, tie_word_embeddings=False))
    elif kind == "gemma2":
        model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, head_dim=8, sliding_window=4, query_pre_attn_scalar=8))
    else:
        text = tf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
        sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
        vision = tf.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
        model = tf.Gemma3ForConditionalGeneration(
            tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
        )
    model = model.float().eval()
    model.save_pretrained(folder)
    return model


def tokens(batch: int = 2, length: int = 12) -> np.ndarray:
    """Random tokens, int32 [batch, length], none of them special."""
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (batch, length)).astype(np.int32)


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    """Next-token logits of a torch model, float32 [B, T, V]."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()
