"""Trains crumb from scratch on the small world, resumably.

    python -m jaxbake.smallworld.train --out DIR --tokens 30000000 --seed 0      (a fixed number of tokens)
    python -m jaxbake.smallworld.train --out DIR --minutes 100 --seed 0          (whatever fits the time)

With `--tokens` the run is a pure function of its arguments (stage changes included, if given by `--stages`); with
`--minutes` the learning rate follows the clock, and `training.json` records the tokens that were reached.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from jaxbake.errors import JaxbakeError, TrainingDiverged
from jaxbake.models.decoder import logits_from
from jaxbake.models.spec import ModelConfig, init_params
from jaxbake.smallworld import CRUMB, fast
from jaxbake.smallworld.curriculum import STAGES
from jaxbake.smallworld.packing import Batch, Stream
from jaxbake.smallworld.score import score_families

CRUMB_CONFIG = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=1024,
    norm_eps=1e-5,
    tie_embeddings=True,
)
LENGTHS = (128, 256, 512, 1024)
SHORTEST = (128, 256, 256)
"""The shortest row length used in each stage."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. `tokens` or `minutes` says how long; the last `decay` of it brings the rate to zero."""

    tokens: int = 0
    minutes: float = 0.0
    seed: int = 0
    lr: float = 3e-3
    warmup: int = 50
    decay: float = 0.4
    batch_tokens: int = 4096
    stages: tuple[int, ...] = ()
    """Tokens after which stages 1 and 2 begin; when not given, held-out accuracy decides, within STAGE_LIMITS."""
    evaluate_every: int = 200
    save_minutes: float = 4.0


STAGE_GOALS = (("facts_1_3", 0.6), ("facts_4_6", 0.85))
STAGE_LIMITS = (0.12, 0.6)
"""A stage ends when its family reaches this held-out accuracy, and at the latest at this share of the run."""


def optimizer(seed_rate: float = 1.0) -> optax.GradientTransformation:
    """Muon on the matrices (updates of RMS 0.2), Adam on embeddings and norms; the rate is applied by the step."""

    def matrices(params):
        def dims(path, leaf):
            stacked = leaf.ndim == 3
            return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if stacked else None

        return jax.tree_util.tree_map_with_path(dims, params)

    return optax.contrib.muon(
        seed_rate, consistent_rms=0.2, adam_b2=0.95, muon_weight_dimension_numbers=matrices, weight_decay=0.0
    )


def batch_loss(params, batch: Batch, config: ModelConfig):
    """Weighted cross-entropy of the learned tokens: (sum, weight)."""
    hidden = fast.forward(params, batch.tokens, batch.segments, config)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.at]
    logits = logits_from({"embed_tokens": params["embed_tokens"].astype(jnp.bfloat16)}, hidden, config=config)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(loss * batch.weights), jnp.sum(batch.weights)


@partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def train_step(params, state, batch: Batch, rate, config: ModelConfig):
    """One update: (params, optimizer state, mean loss)."""

    def mean(params):
        total, weight = batch_loss(params, batch, config)
        return total / weight

    loss, grads = jax.value_and_grad(mean)(params)
    updates, state = optimizer().update(grads, state, params)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, loss


def rate_at(config: TrainConfig, step: int, progress: float) -> float:
    """Learning rate: linear warm-up over steps, then constant, then linear to zero over the last share of the run."""
    return config.lr * min(1.0, (step + 1) / config.warmup) * min(1.0, max(0.0, (1 - progress) / config.decay))


@dataclass
class Run:
    """A run in progress; all of it is saved and restored."""

    params: dict
    opt_state: object
    stream: Stream
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    stage_tokens: tuple[int, ...] = ()


def start(config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer) -> Run:
    """A new run."""
    params = init_params(jax.random.key(config.seed), model)
    stream = Stream.start(tokenizer, config.seed, LENGTHS, config.batch_tokens)
    return Run(params, optimizer().init(params), stream)


def _flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def save(run: Run, folder: Path) -> None:
    """Writes the run to `folder/checkpoint`, atomically."""
    new, old = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(_flat({"params": run.params, "opt_state": run.opt_state}), new / "arrays.safetensors")
    plain = {k: getattr(run, k) for k in ("step", "tokens", "seconds", "stage", "stage_tokens")}
    (new / "run.json").write_text(json.dumps(plain | {"stream": run.stream.state()}))
    if old.exists():
        aside = folder / "checkpoint.old"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(old, aside)
    os.replace(new, old)


def restore(run: Run, folder: Path) -> bool:
    """Brings a fresh run to the state saved in a folder; False where there is none.

    Raises JaxbakeError where the saved arrays are not those of this model.
    """
    found = [f for f in (folder / "checkpoint", folder / "checkpoint.old") if (f / "run.json").exists()]
    if not found:
        return False
    arrays = load_file(found[0] / "arrays.safetensors")
    tree = {"params": run.params, "opt_state": run.opt_state}
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    if set(names) != set(arrays) or any(arrays[n].shape != x.shape for n, (_, x) in zip(names, leaves, strict=True)):
        raise JaxbakeError(f"{found[0]} holds the checkpoint of another model; give another --out")
    tree = structure.unflatten([jnp.asarray(arrays[name]) for name in names])
    run.params, run.opt_state = tree["params"], tree["opt_state"]
    saved = json.loads((found[0] / "run.json").read_text())
    run.stream.restore(saved.pop("stream"))
    saved["stage_tokens"] = tuple(saved["stage_tokens"])
    for name, value in saved.items():
        setattr(run, name, value)
    return True


def progress_of(config: TrainConfig, run: Run) -> float:
    """Share of the run that is done, by the clock or by tokens."""
    return run.seconds / (60 * config.minutes) if config.minutes else run.tokens / config.tokens


def step_once(config: TrainConfig, model: ModelConfig, run: Run) -> jax.Array:
    """One step on the stream's next batch; returns the loss."""
    batch = run.stream.next(run.stage, SHORTEST[run.stage])
    rate = rate_at(config, run.step, progress_of(config, run))
    run.params, run.opt_state, loss = train_step(run.params, run.opt_state, batch, jnp.float32(rate), model)
    run.step += 1
    run.tokens += int(np.count_nonzero(batch.segments))
    return loss


def next_stage(config: TrainConfig, run: Run, accuracy: dict[str, float]) -> bool:
    """Whether the curriculum moves on."""
    if run.stage + 1 >= len(STAGES):
        return False
    if config.stages:
        return run.tokens >= config.stages[run.stage]
    family, goal = STAGE_GOALS[run.stage]
    return accuracy.get(family, 0.0) >= goal or progress_of(config, run) >= STAGE_LIMITS[run.stage]


def train(config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer, folder: Path) -> Run:
    """Trains to the end, logging to `log.jsonl`, saving every few minutes; continues a run found in the folder."""
    if bool(config.tokens) == bool(config.minutes):
        raise JaxbakeError("give either tokens or minutes, not both and not neither")
    folder.mkdir(parents=True, exist_ok=True)
    run = start(config, model, tokenizer)
    restore(run, folder)
    clock, saved, losses = time.monotonic() - run.seconds, run.seconds, []
    with open(folder / "log.jsonl", "a") as log:

        def write(**entry):
            at = {"step": run.step, "tokens": run.tokens, "seconds": round(run.seconds)}
            log.write(json.dumps(at | entry) + "\n")
            log.flush()

        while progress_of(config, run) < 1:
            losses.append(step_once(config, model, run))
            accuracy: dict[str, float] = {}
            if run.step % 10 == 0:
                mean = float(jnp.mean(jnp.stack(losses)))
                losses = []
                if not np.isfinite(mean):
                    raise TrainingDiverged(f"the loss is {mean} at step {run.step}; the last checkpoint is kept")
                run.seconds = time.monotonic() - clock
                write(loss=round(mean, 4), stage=run.stage, rate=rate_at(config, run.step, progress_of(config, run)))
            if run.step % config.evaluate_every == 0:
                families = tuple(f for f in STAGES[run.stage] if not f.endswith("_few"))
                accuracy = score_families(run.params, model, tokenizer, families, n=32, seed=1)
                write(accuracy={k: round(v, 3) for k, v in accuracy.items()})
            if (config.stages or accuracy) and next_stage(config, run, accuracy):
                run.stage, run.stage_tokens = run.stage + 1, (*run.stage_tokens, run.tokens)
                write(new_stage=run.stage)
            if run.seconds - saved > 60 * config.save_minutes:
                save(run, folder)
                saved = run.seconds
    save(run, folder)
    record = {"config": asdict(config), "tokens": run.tokens, "stages": run.stage_tokens, "steps": run.step}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Train crumb on the small world.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and record")
    parser.add_argument("--tokens", type=int, default=0, help="length of the run in tokens")
    parser.add_argument("--minutes", type=float, default=0.0, help="or its length in minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--stages", type=int, nargs=2, default=(), help="tokens at which stages 1 and 2 begin")
    parser.add_argument("--tokenizer", type=Path, default=CRUMB / "tokenizer.json")
    options = parser.parse_args()
    config = TrainConfig(
        tokens=options.tokens, minutes=options.minutes, seed=options.seed, lr=options.lr, stages=tuple(options.stages)
    )
    train(config, CRUMB_CONFIG, Tokenizer.from_file(str(options.tokenizer)), options.out)


if __name__ == "__main__":
    main()
