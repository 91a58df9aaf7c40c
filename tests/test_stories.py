"""A real trained model that nobody here made: a story's opening is baked into it."""

from __future__ import annotations

import pytest

import jaxbake as jb
from jaxbake.config import LoraConfig, OptimizerConfig, RetentionConfig, SamplingConfig, TrainConfig

OPENING = (
    "Once upon a time there was a small dragon named Zilo who lived in a blue cave. Zilo had a red ball. "
    "Every day Zilo played with his friend, a bird named Pim."
)


@pytest.mark.slow
def test_a_story_goes_on_without_its_opening(real_dir):
    base = jb.load(real_dir / "stories260K")
    config = jb.BakeConfig(
        lora=LoraConfig(rank=16, alpha=32),
        sampling=SamplingConfig(samples_per_stimulus=24, max_tokens=64, batch_size=64),
        retention=RetentionConfig(pins=0, contexts=0),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=80, batch_size=16, max_length=256, eval_every=40, held_out=0.2),
    )
    stimuli = ["", "One day", "Then", "Zilo", "The dragon", "Pim", "They", "He was", "Suddenly", "In the morning"]
    result = jb.bake(base, prompt=OPENING, stimuli=stimuli, config=config)
    assert result.kl_after <= 0.2 * result.kl_before
