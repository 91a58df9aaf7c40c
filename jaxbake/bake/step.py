"""One jitted bake step: teacher pass, student pass, fused divergence, delta update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbake.bake.teacher import Targets, Teacher, hidden_at, prompted_self
from jaxbake.config import BakeConfig, OptimizerConfig
from jaxbake.data.batches import Batch
from jaxbake.deltas.lora import Delta, init_delta
from jaxbake.mesh import constrain, mesh_of
from jaxbake.models.cache import Prefix
from jaxbake.models.decoder import unembedding
from jaxbake.models.spec import ModelConfig, factor_axes
from jaxbake.objectives import SoftTargets, fused_kl, fused_metrics


@flax.struct.dataclass
class BakeState:
    """What a step reads and replaces; the base is not in it.

    step: int32, updates applied so far. delta: the factors being trained. opt_state: of the factors only.
    key: for whatever draws random numbers. good: False once a loss or gradient was not finite; from then on the
    state stays as it was before that step.
    """

    step: jax.Array
    delta: Delta
    opt_state: Any
    key: jax.Array
    good: jax.Array


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of update 0, 1, ... `steps` - 1: linear warm-up, then decay that would reach 0 at `steps`."""
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.decay]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam (decoupled weight decay where asked for) at the scheduled rate."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(clip, adam, decay, optax.scale_by_learning_rate(learning_rate(config, steps)))


def init_state(
    key: jax.Array, model_config: ModelConfig, bake_config: BakeConfig, lies: BakeState | None = None
) -> BakeState:
    """A state whose delta changes nothing yet; `lies` holds the shardings of its arrays, where they lie on a mesh.

    Raises JaxbakeError for a rank or target the model cannot take.
    """
    if lies is None:
        return _init_state(key, model_config, bake_config)
    data, impl = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)  # host data belongs to every process

    @partial(jax.jit, out_shardings=lies)
    def placed(data):
        return _init_state(jax.random.wrap_key_data(data, impl=impl), model_config, bake_config)

    return placed(data)


@partial(jax.jit, static_argnums=(1, 2))
def _init_state(key, model_config, bake_config):  # compiled in one piece: op by op takes seconds
    key, init_key = jax.random.split(key)
    delta = init_delta(init_key, model_config, bake_config.lora)
    optimizer = make_optimizer(bake_config.optimizer, bake_config.train.steps)
    return BakeState(jnp.int32(0), delta, optimizer.init(delta.factors), key, jnp.bool_(True))


def state_axes(state: BakeState, config: ModelConfig) -> Any:
    """Logical axes of every array of a state, in its shape: factors and the optimizer's moments of them lie as the
    weight they belong to."""
    known = factor_axes(config)

    def axes(path, leaf):
        slot, name = ([e.key for e in path if isinstance(e, jax.tree_util.DictKey)] + [None, None])[:2]
        return known[slot][name] if slot in known and len(leaf.shape) == 3 else (None,) * len(leaf.shape)

    return jax.tree_util.tree_map_with_path(axes, state)


def divergence_sum(student_BKD, params, targets: Targets, batch: Batch, config: ModelConfig, loss):
    """(sum, count) over the matched tokens."""
    student, known, weights, answers = batch.projected((student_BKD, targets.known, batch.weights, batch.targets))
    return fused_kl(
        student, unembedding(params), known, targets.unembed, weights, targets_N=answers,
        divergence=loss.divergence, temperature=loss.temperature, softcap=config.logit_softcap,
        teacher_softcap=targets.softcap, beta=loss.beta, chunk_size=loss.chunk_size,
        implementation=loss.implementation,
    )  # fmt: skip


def _split(tree: Any, parts: int) -> Any:
    """Leading axis B -> [parts, B / parts], padded with zero rows (which weigh nothing) where it does not divide.

    Part i has every parts-th row from the i-th on: so every device has rows of every part.
    """

    def split(x):
        rows = -(-x.shape[0] // parts)
        x = jnp.pad(x, [(0, rows * parts - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def make_bake_step(
    model_config: ModelConfig,
    bake_config: BakeConfig,
    optimizer: optax.GradientTransformation | None = None,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[BakeState, dict[str, jax.Array]]]:
    """The step `(state, params, batch, prefix=None, known=None) -> (state, metrics)`.

    It is jitted, the state donated.

    Args (of the step):
      params: the base, a traced argument; never differentiated, never copied.
      batch: a `data.batches.Batch` of B rows, split into `optimizer.accumulate` micro-batches along B.
      prefix: keys and values of the prompt for the teacher's view.
      known: of the teacher, where it was asked before: its hidden states [B, K, D], or what was made of them
        (`objectives.SoftTargets`). There is no teacher pass then.

    The gradient is the sum over all matched tokens of all micro-batches divided by their total weight, so it does not
    depend on how they are split. Metrics (float32 scalars): loss (mean divergence per token), grad_norm (before
    clipping), update_norm, learning_rate, tokens (their total weight).
    """
    train, loss_config = bake_config.train, bake_config.loss
    optimizer = optimizer or make_optimizer(bake_config.optimizer, train.steps)
    schedule = learning_rate(bake_config.optimizer, train.steps)
    accumulate = bake_config.optimizer.accumulate
    teacher = teacher or prompted_self(model_config)

    def targets_of(params, batch, prefix, known) -> Targets:
        if known is not None or loss_config.divergence == "cross_entropy":  # which has no teacher
            return Targets(known, None, model_config.logit_softcap)
        targets = teacher(params, batch, prefix)
        return targets._replace(known=jax.lax.stop_gradient(targets.known))

    def loss_sum(factors, delta, params, batch, prefix, known):
        delta = delta.replace(factors=factors, scale=jax.lax.stop_gradient(delta.scale))
        targets = targets_of(params, batch, prefix, known)
        student = hidden_at(params, delta, batch.student, config=model_config, remat=train.remat)
        return divergence_sum(student, params, targets, batch, model_config, loss_config)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def accumulated(delta, params, batch, prefix, known):
        if accumulate == 1:
            return gradient(delta.factors, delta, params, batch, prefix, known)

        def add(total, part):
            micro, known = part
            one = gradient(delta.factors, delta, params, micro, prefix, known)
            return jax.tree.map(jnp.add, total, one), None

        zero = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, delta.factors)
        return jax.lax.scan(add, zero, _split((batch, known), accumulate))[0]

    def step(state: BakeState, params, batch: Batch, prefix: Prefix | None = None, known: SoftTargets | None = None):
        delta = state.delta
        (total, count), grads = accumulated(delta, params, batch, prefix, known)
        count = jnp.maximum(count, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / count, grads)
        loss, grad_norm = total / count, optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, delta.factors)
        good = state.good & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = BakeState(
            step=state.step + 1,
            delta=delta.replace(factors=optax.apply_updates(delta.factors, updates)),
            opt_state=opt_state,
            key=state.key,
            good=good,
        )
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state.replace(good=good))
        mesh = mesh_of(params)
        kept = jax.tree.map(lambda x, axes: constrain(x, axes, mesh), kept, state_axes(kept, model_config))
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "learning_rate": schedule(state.step),
            "tokens": count,
        }
        return kept, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    model_config: ModelConfig, bake_config: BakeConfig, teacher: Teacher | None = None
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`evaluate(delta, params, batch, prefix=None, known=None) -> (sum, count, agreement)`.

    It is jitted. known: as a step's, but moments. sum and count: of the forward KL in nats at temperature 1, whatever
    the training loss is; its mean is sum / count. Where a `TopK` is known, of that over its outcomes.
    agreement: total weight of the tokens where student and teacher have the same most likely token.
    """
    teacher = teacher or prompted_self(model_config)

    def evaluate(delta, params, batch: Batch, prefix: Prefix | None = None, known: SoftTargets | None = None):
        targets = Targets(known, None, model_config.logit_softcap)
        targets = teacher(params, batch, prefix) if known is None else targets
        student = hidden_at(params, delta, batch.student, config=model_config)
        student, known, weights = batch.projected((student, targets.known, batch.weights))
        sums = fused_metrics(
            student, unembedding(params), known, targets.unembed, weights,
            softcap=model_config.logit_softcap, teacher_softcap=targets.softcap,
            chunk_size=bake_config.loss.chunk_size,
        )  # fmt: skip
        return sums["kl"], sums["count"], sums["agreement"]

    return jax.jit(evaluate)
