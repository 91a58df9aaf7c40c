"""Everything a person sets, as frozen dataclasses; `recipe.py` reads them from YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxbake.errors import JaxbakeError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise JaxbakeError(message)


@dataclass(frozen=True)
class LoraConfig:
    """The low-rank delta. `targets`: "all" linear layers, or names such as q_proj. `init`: which factor is random."""

    rank: int = 32
    alpha: float = 64.0
    targets: Literal["all"] | tuple[str, ...] = "all"
    rslora: bool = False
    init: Literal["a_random", "b_random"] = "a_random"

    def __post_init__(self):
        _require(self.rank >= 1, f"lora.rank: {self.rank} is not a rank; use at least 1, usual are 8 to 64")
        _require(self.alpha > 0, f"lora.alpha: {self.alpha} must be above 0; usual is rank to 2 x rank")
        _require(len(self.targets) > 0, "lora.targets: empty; use 'all' or names such as q_proj")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class GenerateConfig:
    """Stimuli written by the model itself from the prompt: how many, and in which seed styles."""

    count: int = 0
    styles: tuple[str, ...] = ("question", "task", "chat", "summary", "application")
    temperature: float = 1.0
    max_tokens: int = 64


@dataclass(frozen=True)
class StimuliConfig:
    """Where user turns come from; sources may be joined. Paths are relative to the recipe.

    items: written here. file: .txt (a stimulus a line) or .jsonl. dataset: a folder or hub name for `datasets`.
    field / template: which column, or a format string over columns ("Q: {question}"). limit: take at most so many.
    """

    items: tuple[str, ...] = ()
    file: str | None = None
    dataset: str | None = None
    split: str = "train"
    field: str | None = None
    template: str | None = None
    limit: int | None = None
    generate: GenerateConfig = GenerateConfig()


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. `temperature` may list several: samples of a stimulus take them in turn."""

    samples_per_stimulus: int = 4
    temperature: tuple[float, ...] = (1.0,)
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    batch_size: int = 32

    def __post_init__(self):
        if isinstance(self.temperature, (int, float)):
            object.__setattr__(self, "temperature", (float(self.temperature),))
        _require(self.samples_per_stimulus >= 1, "sampling.samples_per_stimulus: must be at least 1")
        _require(self.max_tokens >= 1, "sampling.max_tokens: must be at least 1")
        _require(self.batch_size >= 1, "sampling.batch_size: must be at least 1")
        _require(
            len(self.temperature) > 0 and all(t >= 0 for t in self.temperature),
            "sampling.temperature: needs numbers of 0 (greedy) or above",
        )
        _require(self.top_k is None or self.top_k >= 1, "sampling.top_k: must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _require(value is None or 0 < value <= 1, f"sampling.{name}: {value} must be in (0, 1]")


@dataclass(frozen=True)
class RetentionConfig:
    """Rows that keep the rest of the model as it was, as fractions of all rows.

    pins: teacher prefix = student prefix, on unrelated stimuli ("do not change here").
    contexts: another prompt o before both, teacher [prompt + o], student [o]: keeps later prompts readable.
    pin_stimuli: a file of user turns for pins; contexts_file: jsonl with {"prompt": ..., "stimuli": [...]}.
    Without files the ones shipped with jaxbake are taken.
    """

    pins: float = 0.15
    contexts: float = 0.2
    pin_stimuli: str | None = None
    contexts_file: str | None = None

    def __post_init__(self):
        _require(self.pins >= 0 and self.contexts >= 0, "retention: fractions must be 0 or above")
        _require(self.pins + self.contexts < 1, "retention: pins + contexts must leave room for the bake (below 1)")


@dataclass(frozen=True)
class LossConfig:
    """The divergence between teacher and student at every response token.

    implementation: how it is computed, which changes speed and memory only; see `objectives.fused_kl`.
    """

    divergence: Literal["forward", "reverse", "jsd", "cross_entropy"] = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    chunk_size: int | None = None
    implementation: Literal["auto", "xla", "tiled", "pallas", "pallas_recompute"] = "auto"

    def __post_init__(self):
        _require(self.temperature > 0, f"loss.temperature: {self.temperature} must be above 0")
        _require(0 < self.beta < 1, f"loss.beta: {self.beta} must be between 0 and 1 (generalised Jensen-Shannon)")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with warm-up and decay. `warmup` is a fraction of all steps; `accumulate` micro-batches make a step."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.05
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: float | None = 1.0
    accumulate: int = 1

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optimizer.learning_rate: {self.learning_rate} must be above 0")
        _require(0 <= self.warmup < 1, f"optimizer.warmup: {self.warmup} is a fraction of the steps, below 1")
        _require(self.accumulate >= 1, "optimizer.accumulate: must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. `batch_size` counts examples a step; `held_out` is the share of stimuli kept for evaluation.

    patience: stop after so many evaluations without a lower held-out KL (None: run all steps).
    max_length: longest row in tokens, prompt not counted; longer examples are refused, never cut.
    teacher_device_gb, teacher_host_gb, teacher_disk_gb: where examples are visited again, what the teacher says of them
      is computed once and kept on the device, in memory or in a file of the output folder, the first of these that may
      take as much (in GiB); where none may, the teacher is asked at every visit, of several prompts as many steps ahead
      as teacher_host_gb holds. It does not change the bake beyond rounding.
    """

    steps: int = 200
    batch_size: int = 16
    max_length: int = 1024
    held_out: float = 0.1
    eval_every: int = 20
    checkpoint_every: int = 50
    patience: int | None = None
    remat: bool = False
    tensorboard: bool = False
    teacher_device_gb: float = 1.0
    teacher_host_gb: float = 4.0
    teacher_disk_gb: float = 64.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "max_length", "eval_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"train.{name}: must be at least 1")
        for name in ("teacher_device_gb", "teacher_host_gb", "teacher_disk_gb"):
            _require(getattr(self, name) >= 0, f"train.{name}: is a number of GiB, 0 or above")
        _require(0 < self.held_out < 1, f"train.held_out: {self.held_out} is a share of the stimuli, between 0 and 1")
        _require(self.patience is None or self.patience >= 1, "train.patience: must be at least 1")


OTHERS_TOP_K = 64
"""How much is kept of another model's distribution by default."""


@dataclass(frozen=True)
class TeacherConfig:
    """Whom the unprompted model is to become like; by default the base itself behind the prompt.

    model: another model, by hub name or folder, with the base's vocabulary. It answers the stimuli, behind the prompt,
      and its distributions are what is matched; it is asked once, and its weights are let go before the training. Pins
      stay the base's own.
    top_k: keep the teacher's so many most likely tokens at each place and the mass of all others, instead of its hidden
      states. The divergence is then that over these k + 1 outcomes, a lower bound of the full one, and `held_out_kl`
      too where another model teaches. None: hidden states and the full divergence; for another model, 64.
    """

    model: str | None = None
    top_k: int | None = None

    def __post_init__(self):
        _require(
            self.model is None or bool(self.model.strip()), "teacher.model: is empty; name a model, or leave it out"
        )
        _require(self.top_k is None or self.top_k >= 1, f"teacher.top_k: {self.top_k} must be at least 1; usual is 64")

    def tokens_kept(self, other: bool) -> int | None:
        """k, or None where hidden states are kept; `other`: another model teaches."""
        return OTHERS_TOP_K if other and self.top_k is None else self.top_k


@dataclass(frozen=True)
class BakeConfig:
    """How a prompt is baked.

    mesh: the devices it is baked on, as "fsdp=4,tp=2", or "auto" (see `jaxbake.mesh`); it does not change the bake.
    """

    lora: LoraConfig = LoraConfig()
    sampling: SamplingConfig = SamplingConfig()
    retention: RetentionConfig = RetentionConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    teacher: TeacherConfig = TeacherConfig()
    seed: int = 0
    mesh: str | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured after a bake, beside the held-out KL.

    file: jsonl of {"question": ..., "answer": ...} the prompt should answer, for the four-cell table.
    match: "exact" (the whole answer), "contains" (the answer occurs), or the name of a rule of `jaxbake.evaluate`.
    abilities: jsonl of questions the bare model answers, for retention; None takes the shipped ones for crumb.
    """

    file: str | None = None
    match: str = "contains"
    abilities: str | None = None
    max_tokens: int = 64
    limit: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One bake from start to end, as `configs/*.yaml` hold it. Exactly one of prompt, prompt_file and prompts_file.

    prompts_file: several prompts (documents, say) for one delta, jsonl of {"prompt": text, "stimuli": [user turns]}. A
      prompt's own stimuli are asked behind it, those of `stimuli` behind every one, and `stimuli.generate` counts for
      each. The teacher of a response reads its own prompt only.
    quantize: hold the model's linear layers as integers, for large models on small chips; the delta stays float.
    """

    name: str
    model: str = "crumb"
    dtype: Literal["float32", "bfloat16"] | None = None
    quantize: Literal["int8", "int4"] | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    prompts_file: str | None = None
    stimuli: StimuliConfig = StimuliConfig()
    bake: BakeConfig = BakeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: str = "runs"

    def __post_init__(self):
        _require(bool(self.name.strip()) and not {"/", "\\"} & set(self.name), "name: needs a name fit for a folder")
        given = [name for name in ("prompt", "prompt_file", "prompts_file") if getattr(self, name) is not None]
        _require(len(given) < 2, f"prompt: give {' or '.join(given)}, not both")
        _require(
            len(given) == 1, "prompt: is missing; give 'prompt: |' with the text to bake, or 'prompt_file: prompt.txt'"
        )
        _require(self.prompt is None or bool(self.prompt.strip()), "prompt: is empty; give the text to bake")
