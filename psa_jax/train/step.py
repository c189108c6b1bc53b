"""The compiled train step and evaluation step.

`train_step(state, batch) -> (state, metrics)` is the only place where a run
moves. What changes during training (learning rate, PRepBN's gamma, the share
of blocks that attention keeps) is read from `state.step` inside the step, so
nothing recompiles; what changes a shape is another batch shape, and one
compilation. The metrics are the values that this step really used.

Gradients are sums over tokens, divided once by the number of tokens, so that
micro-batches accumulate to the gradient of the whole batch, whatever each of
them counts. What the model adds to the loss of the text (`Loss.auxiliary`) has
the same unit; it is trained on, but no part of the metric `loss` and its like.
Batch-norm statistics pass from one micro-batch to the next.

An update that would not be finite is not made: the old state comes back with
`fault` set, and every later step returns it unchanged. The loop, which reads
metrics one step late, then still holds the last good state.

Randomness: a model that needs some in training folds `step` into its key.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config
from psa_jax.tasks import Loss, Task
from psa_jax.train import controller, optim
from psa_jax.train.state import Program, TrainState

FAULTS = ('loss', 'grad_norm', 'parameters', 'statistics', 'optimizer state')
# The state before such an update is sound: its loss and gradient are finite.
OF_UPDATE = ('parameters', 'optimizer state')


def make_train_step(config: Config, task: Task, program: Program):
  """Returns the jitted `(state, batch) -> (state, metrics)`; donates state.

  Args:
    config: optimiser, accumulation and the run's length.
    task: the loss.
    program: model structure, optimiser and mesh.

  The metrics are f32 scalars: the task's own, `grad_norm` before clipping,
  `learning_rate`, what the model reports (`density`, `gamma`, ...), and the
  int32 `fault`, which counts from 1 in `FAULTS`.
  """
  total_steps = sum(config.train.steps)
  rate_at = optim.learning_rate(config.optim, total_steps)
  attention = config.model.attention

  def train_step(state: TrainState, batch):
    grads, model_state, loss = _gradients(
      config.optim.accumulate, task, program, state, batch
    )
    grads = jax.tree.map(lambda g: g / _nonzero(loss.weight), grads)
    grads = optim.freeze(attention, state.step, grads)
    model_state = optim.freeze_statistics(
      attention, state.step, state.model_state, model_state
    )
    rate = rate_at(state.step)

    def updated() -> TrainState:
      directions, opt_state = program.optimizer.update(
        grads, state.opt_state, state.params
      )
      directions = optim.freeze(attention, state.step, directions)
      move = functools.partial(_move, rate)
      params = jax.tree.map(move, state.params, directions)
      after = controller.observe(
        config.train.controller,
        state.controller,
        step=state.step,
        retained_mass=loss.means.get('retained_mass'),
        loss=metrics['loss'],
      )
      step, fault = state.step + 1, jnp.int32(0)
      return TrainState(step, params, model_state, opt_state, fault, after)

    metrics = {
      **task.metrics(loss),
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': rate,
      **loss.means,
    }
    # `updated` is computed twice. Once only to be checked, which XLA does
    # without storing it, and then in place: choosing between two finished
    # states would keep both in memory.
    checked = updated()
    new_fault = _fault(metrics, checked.params, model_state, checked.opt_state)
    fault = jnp.where(state.fault > 0, state.fault, new_fault)
    kept = jax.lax.cond(fault == 0, updated, lambda: state)
    return kept._replace(fault=fault), {**metrics, 'fault': fault}

  whole = sharding.replicated(program.mesh)
  return jax.jit(
    train_step, donate_argnums=0, out_shardings=(program.shardings, whole)
  )


def make_eval_step(task: Task, program: Program):
  """Returns the jitted `(state, batch) -> Loss`; leaves the state alone.

  Args:
    task: the loss.
    program: model structure and mesh; its attention may be another one than
      that of the run (`Program.read_by`).
  """

  def eval_step(state: TrainState, batch) -> Loss:
    model = program.merge(state.params, state.model_state)
    return task.loss(model, batch, _context(program, state, train=False))

  return jax.jit(eval_step, out_shardings=sharding.replicated(program.mesh))


def _context(
  program: Program, state: TrainState, *, train: bool
) -> AttentionContext:
  """What the state says of a call: its step, and a budget if one is set."""
  mechanism = program.config.model.attention.mechanism
  budget = controller.budget(state.controller)
  return AttentionContext(
    step=state.step,
    train=train,
    budget=budget if mechanism.takes_budget else None,
  )


def _gradients(accumulate, task, program, state, batch):
  """Gradient of the summed loss, new model state and `Loss` of a batch."""

  def micro(model_state, batch):
    def loss_of(params):
      model = program.merge(params, model_state)
      loss = task.loss(model, batch, _context(program, state, train=True))
      total = loss.total + loss.auxiliary
      return total, (loss, program.model_state(model))

    grad = jax.grad(loss_of, has_aux=True)
    grads, (loss, model_state) = grad(state.params)
    return _to_f32(grads), model_state, loss

  if accumulate == 1:
    return micro(state.model_state, batch)
  pieces = _micro_batches(batch, accumulate, program.mesh)
  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(micro, state.model_state, first)
  grads, _, loss = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def body(carry, piece):
    grads, model_state, loss = carry
    more_grads, model_state, more_loss = micro(model_state, piece)
    add = functools.partial(jax.tree.map, operator.add)
    return (add(grads, more_grads), model_state, add(loss, more_loss)), None

  carry = (grads, state.model_state, loss)
  (grads, model_state, loss), _ = jax.lax.scan(body, carry, pieces)
  means = {name: value / accumulate for name, value in loss.means.items()}
  return grads, model_state, loss._replace(means=means)


def _micro_batches(batch, count, mesh):
  """[B, ...] to [count, B / count, ...] without moving rows over devices.

  Micro-batch i takes the rows i, i + count, ...: each device cuts the rows
  it already holds.
  """
  where = sharding.batch_sharding(mesh, leading=1)

  def split(x):
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, where)

  return jax.tree.map(split, batch)


def _fault(
  metrics: Any, params: Any, model_state: Any, opt_state: Any
) -> jax.Array:
  """0, or which of `FAULTS` is the first that is not finite, from 1."""
  finite = [
    jnp.isfinite(metrics['loss']),
    jnp.isfinite(metrics['grad_norm']),
    _all_finite(params),
    _all_finite(model_state),
    _all_finite(opt_state),
  ]
  failed = ~jnp.stack(finite)
  fault = jnp.where(jnp.any(failed), jnp.argmax(failed) + 1, 0)
  return fault.astype(jnp.int32)


def _all_finite(tree) -> jax.Array:
  finite = [
    jnp.all(jnp.isfinite(x))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.all(jnp.stack(finite)) if finite else jnp.array(True)


def _move(rate, param, direction):
  """One step against the direction, in f32; keeps the parameter's dtype."""
  updated = param.astype(jnp.float32) - rate * direction.astype(jnp.float32)
  return updated.astype(param.dtype)


def _to_f32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _nonzero(weight):
  """`weight`, or 1 where a batch counts nothing: its gradient is 0."""
  return jnp.where(weight == 0, 1, weight)
