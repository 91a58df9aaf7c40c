"""One jitted step of many bakes: one pass over the base for all rows, each member's own loss, clip and update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbake.bake.step import BakeState, divergence_sum, init_state, learning_rate, state_axes
from jaxbake.bake.teacher import Targets, hidden_at
from jaxbake.config import BakeConfig, LossConfig
from jaxbake.data.batches import Batch
from jaxbake.deltas.lora import Delta
from jaxbake.deltas.many import Deltas, cut, one_of, stack
from jaxbake.mesh import AnyMesh, constrain, mesh_of, sharding
from jaxbake.models.decoder import unembedding
from jaxbake.models.spec import ModelConfig
from jaxbake.objectives import SoftTargets, fused_metrics


@flax.struct.dataclass
class Hyper:
    """The optimizer's settings, one a member: rates float32 [M, steps], the others float32 [M]."""

    rates: jax.Array
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    weight_decay: jax.Array
    clip_norm: jax.Array


def hyper(configs: Sequence[BakeConfig]) -> Hyper:
    """The members' settings as arrays; rates after a member's last step are 0."""
    most = max(config.train.steps for config in configs)
    rates = np.zeros((len(configs), most), np.float32)
    for row, config in zip(rates, configs, strict=True):
        schedule = learning_rate(config.optimizer, config.train.steps)
        row[: config.train.steps] = schedule(jnp.arange(config.train.steps))
    optimizers = [config.optimizer for config in configs]

    def column(name: str, none: float = 0.0) -> jax.Array:
        found = [getattr(optimizer, name) for optimizer in optimizers]
        return jnp.asarray([none if value is None else value for value in found], jnp.float32)

    return Hyper(
        jnp.asarray(rates), column("b1"), column("b2"), column("eps"), column("weight_decay"),
        column("clip_norm", none=jnp.inf),
    )  # fmt: skip


def _wide(tree: Any) -> Any:
    """What each member has one of, [M], as it meets factors: [M, 1, 1]."""
    return jax.tree.map(lambda x: x[:, None, None] if x.ndim == 1 else x, tree)


def _norms(tree: Any) -> jax.Array:
    """The members' global norms [M] of stacked factors."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=(0, 2, 3)) for x in jax.tree.leaves(tree)))


def _chosen(which: jax.Array, new: Any, old: Any) -> Any:
    """The new values of the members that `which`, bool [M], says, and the old ones of the others."""
    return jax.tree.map(lambda n, o: jnp.where(_wide(which) if n.ndim > 2 else which, n, o), new, old)


def _update(hyper: Hyper, rate: jax.Array, chosen: jax.Array, grads: dict, opt_state: Any, factors: dict):
    """The optimizer of `step.make_optimizer` behind its clipping, with each member's settings for its part of a leaf.

    Returns the updates, and the new state of the optimizer: that of the `chosen` members.
    """
    h, (clip, adam, decay, schedule) = _wide(replace(hyper, rates=None)), opt_state
    count = adam.count + 1
    mu = optax.tree.update_moment(grads, adam.mu, h.b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, adam.nu, h.b2, 2)
    new = optax.ScaleByAdamState(count, mu, nu), optax.ScaleByScheduleState(schedule.count + 1)
    # The updates are made from moments already in their place: otherwise a CPU copies the old ones first.
    adam, schedule = jax.lax.optimization_barrier(_chosen(chosen, new, (adam, schedule)))
    mu = optax.tree.bias_correction(adam.mu, h.b1, _wide(count))
    nu = optax.tree.bias_correction(adam.nu, h.b2, _wide(count))

    def update(m, v, factor):
        return -_wide(rate) * (m / (jnp.sqrt(v) + h.eps) + h.weight_decay * factor)

    return jax.tree.map(update, mu, nu, factors), (clip, adam, decay, schedule)


def init_states(model_config: ModelConfig, configs: Sequence[BakeConfig]) -> BakeState:
    """The members' states as one: every delta as its own bake would begin.

    Leaves have a leading axis [M], factors and moments [L, M, ...]; `delta` is a `Deltas`. Raises JaxbakeError for a
    rank or target the model cannot take.
    """
    # Nothing else of the settings has an influence, and so each kind of delta is compiled once.
    starts = [init_state(jax.random.key(c.seed), model_config, BakeConfig(lora=c.lora)) for c in configs]
    deltas = stack([start.delta for start in starts])
    zeros = jax.tree.map(jnp.zeros_like, deltas.factors)
    count = jnp.zeros(len(configs), jnp.int32)
    adam = optax.ScaleByAdamState(count, zeros, jax.tree.map(jnp.copy, zeros))
    return BakeState(
        step=jnp.zeros_like(count),
        delta=deltas,
        opt_state=(optax.EmptyState(), adam, optax.EmptyState(), optax.ScaleByScheduleState(jnp.zeros_like(count))),
        key=jnp.stack([start.key for start in starts]),
        good=jnp.ones(len(configs), bool),
    )


def member_state(state: BakeState, m: int, delta: Delta) -> BakeState:
    """Member m's state as its own bake would hold it; `delta` is one of its rank and slots."""
    slots, rank = tuple(delta.factors), delta.config.rank
    clip, adam, decay, schedule = state.opt_state
    adam = optax.ScaleByAdamState(adam.count[m], cut(adam.mu, m, rank, slots), cut(adam.nu, m, rank, slots))
    return BakeState(
        step=state.step[m],
        delta=one_of(state.delta, m, delta.config, slots),
        opt_state=(clip, adam, decay, optax.ScaleByScheduleState(schedule.count[m])),
        key=state.key[m],
        good=state.good[m],
    )


def keep(tree: Any, members: Sequence[int]) -> Any:
    """The stacked tree with these members only."""
    at = np.asarray(members)
    return jax.tree.map(lambda x: x[:, at] if x.ndim > 2 else x[at], tree)


def _axes(state: BakeState, config: ModelConfig) -> Any:
    """Logical axes of every array, as `step.state_axes` gives them alone; that of the members is never split."""
    first = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[:, 0] if x.ndim > 2 else x, tree), state)
    own = state_axes(first, config)
    return jax.tree.map(lambda x, axes: (axes[0], None, *axes[1:]) if x.ndim > 2 else axes, state, own)


def spread(state: BakeState, config: ModelConfig, mesh: AnyMesh | None) -> BakeState:
    """The members' states on a mesh, factors and moments as the weight they belong to; as they are where there is
    none. They may lie on it already, or whole in every process."""
    if mesh is None:
        return state
    lies = jax.tree.map(lambda x, axes: sharding(axes, mesh, x.shape), state, _axes(state, config))
    if jax.process_count() == 1:
        return jax.tree.map(jax.device_put, state, lies)
    if state.step.is_fully_addressable:
        impl = jax.random.key_impl(state.key)
        state = jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))  # host data is everybody's
        return jax.jit(lambda s: s.replace(key=jax.random.wrap_key_data(s.key, impl=impl)), out_shardings=lies)(state)
    return jax.jit(lambda s: s, out_shardings=lies)(state)


def _by_member(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(count, -1).sum(axis=1)


def _parts(tree: Any, members: int, parts: int) -> Any:
    """Rows [M * B, ...] -> [parts, M * B / parts, ...], with as many rows of every member in each part."""

    def split(x):
        x = x.reshape(members, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def make_many_step(
    model_config: ModelConfig, loss_config: LossConfig, *, accumulate: int = 1, remat: bool = False
) -> Callable[..., tuple[BakeState, dict[str, jax.Array]]]:
    """The step `(state, hyper, active, params, batch, known) -> (state, metrics)`, jitted, state donated.

    Args (of the step):
      state: of M members, as `init_states` gives it.
      active: bool [M]; the others are left as they are.
      params: the base, a traced argument; never differentiated, never copied.
      batch: M * B rows, B of each member in order; only its student view is looked at.
      known: of the teachers, as in `step.make_bake_step`, of all rows in one form; None for cross-entropy.

    Each member's gradient is the sum over its matched tokens divided by their weight; its norm is clipped and its delta
    updated as `make_bake_step` does alone. A member whose loss or gradient is not finite keeps its state, and none
    other is touched. Metrics: as there, float32 [M].
    """

    def loss_sum(factors, weights, delta, params, batch, known):
        delta = Deltas(factors, jax.lax.stop_gradient(delta.scale))
        student = hidden_at(params, delta, batch.student, config=model_config, remat=remat)
        targets = Targets(known, None, model_config.logit_softcap)
        batch = batch.replace(weights=weights)
        return divergence_sum(student, params, targets, batch, model_config, loss_config)[0]

    # The members share no parameter, so the gradient of the sum over all is each one's own; and the derivative by a
    # token's weight is that token's loss, from which each one's loss follows.
    gradient = jax.grad(loss_sum, argnums=(0, 1))

    def accumulated(delta, params, batch, known):
        def one(batch, known):
            grads, per_token = gradient(delta.factors, batch.weights, delta, params, batch, known)
            weighted = jnp.where(batch.weights != 0, batch.weights * per_token, 0)
            return _by_member(weighted, delta.count), _by_member(batch.weights, delta.count), grads

        if accumulate == 1:
            return one(batch, known)

        def add(total, part):
            return jax.tree.map(jnp.add, total, one(*part)), None

        zero = jnp.zeros(delta.count, jnp.float32)
        start = zero, zero, jax.tree.map(jnp.zeros_like, delta.factors)
        return jax.lax.scan(add, start, _parts((batch, known), delta.count, accumulate))[0]

    def step(state: BakeState, hyper: Hyper, active, params, batch: Batch, known: SoftTargets | None = None):
        delta = state.delta
        total, count, grads = accumulated(delta, params, batch.replace(teacher=None), known)
        count = jnp.maximum(count, jnp.finfo(jnp.float32).tiny)

        loss, grad_norm = total / count, _norms(grads) / count
        good = state.good & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        share = jnp.where(grad_norm < hyper.clip_norm, 1, hyper.clip_norm / grad_norm) / count
        grads = jax.tree.map(lambda g: _wide(share) * g, grads)
        at = jnp.minimum(state.step, hyper.rates.shape[1] - 1)
        rate = jnp.take_along_axis(hyper.rates, at[:, None], axis=1)[:, 0]
        chosen = good & active
        updates, opt_state = _update(hyper, rate, chosen, grads, state.opt_state, delta.factors)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": _norms(updates),
            "learning_rate": rate,
            "tokens": count,
        }
        factors = _chosen(chosen, optax.apply_updates(delta.factors, updates), delta.factors)
        kept = state.replace(
            step=jnp.where(chosen, state.step + 1, state.step),
            delta=delta.replace(factors=factors),
            opt_state=opt_state,
            good=jnp.where(active, good, state.good),
        )
        mesh = mesh_of(params)
        kept = jax.tree.map(lambda x, axes: constrain(x, axes, mesh), kept, _axes(kept, model_config))
        return kept, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return jax.jit(step, donate_argnums=0)


def make_many_eval(model_config: ModelConfig, loss_config: LossConfig) -> Callable[..., tuple[jax.Array, ...]]:
    """`evaluate(delta, params, batch, known) -> (sum, count, agreement)`, float32 [M] each, jitted.

    As `step.make_eval_step` gives them alone; batch as in `make_many_step`.
    """

    @jax.jit
    def evaluate(delta: Deltas, params, batch: Batch, known: SoftTargets):
        student = hidden_at(params, delta, batch.student, config=model_config)

        def sums(weights):
            found = fused_metrics(
                student, unembedding(params), known, None, weights, softcap=model_config.logit_softcap,
                chunk_size=loss_config.chunk_size,
            )  # fmt: skip
            return found["kl"], found["agreement"]

        _, pull = jax.vjp(sums, batch.weights)  # by a token's weight: that token's own value
        by_member = partial(_by_member, count=delta.count)
        kl, agreement = (pull((jnp.float32(i == 0), jnp.float32(i == 1)))[0] for i in range(2))
        return by_member(batch.weights * kl), by_member(batch.weights), by_member(batch.weights * agreement)

    return evaluate
