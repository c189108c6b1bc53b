"""AdamW (arXiv 1711.05101) with warm-up, cosine decay and clipping.

optax gives the pieces. The learning rate is not one of them: the train step
multiplies by it, so that the value it logs is the value it used, and so that
one counter (the step in the train state) drives every schedule of the run.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from psa_jax import sharding
from psa_jax.config import AttentionConfig, ConfigError, OptimConfig
from psa_jax.types import Scalar


def learning_rate(
  config: OptimConfig, total_steps: int
) -> Callable[[Scalar], jax.Array]:
  """The rate of the update that follows `step` updates.

  It rises linearly to `learning_rate` at update number `warmup_steps` and
  falls by a cosine to `final_lr_ratio` of that at update number `decay_steps`.
  The first update already moves: it is number 1, not 0.

  Args:
    config: rates in the units of the parameters, lengths in updates.
    total_steps: the run's length, the cosine's end if none is set.

  Raises:
    ConfigError: the warm-up does not end before the cosine does.
  """
  decay_steps = config.decay_steps or total_steps
  if config.warmup_steps >= decay_steps:
    raise ConfigError(
      f'optim.warmup_steps={config.warmup_steps} must be below the '
      f'{decay_steps} steps of the cosine (optim.decay_steps, or the sum of '
      'train.steps)'
    )
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=decay_steps,
    end_value=config.learning_rate * config.final_lr_ratio,
  )
  return lambda step: jnp.asarray(schedule(step + 1), jnp.float32)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Turns gradients into the direction that the learning rate scales.

  Clipping comes first, then Adam's moments, then decoupled weight decay of
  the matrices only.
  """
  parts = []
  if config.clip_norm:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, is_matrix))
  return optax.chain(*parts)


def freeze(attention: AttentionConfig, step: Scalar, tree: Any) -> Any:
  """Zeros for what does not train yet.

  While `attention.frozen_steps` last, only the parameters of the mechanism
  move. Both the gradients and the directions have to pass through here: the
  gradients so that no moments gather and clipping sees what trains, the
  directions because weight decay moves a parameter without a gradient.

  Args:
    attention: says how long.
    step: optimiser updates made so far; traced, so nothing compiles again.
    tree: arrays by the names of the parameters.
  """
  if not attention.frozen_steps:
    return tree
  trains = jnp.asarray(step) >= attention.frozen_steps

  def one(path, x):
    is_mechanism = any(
      getattr(entry, 'key', None) == 'mechanism' for entry in path
    )
    return x if is_mechanism else jnp.where(trains, x, jnp.zeros_like(x))

  return jax.tree.map_with_path(one, tree)


def freeze_statistics(
  attention: AttentionConfig, step: Scalar, before: Any, after: Any
) -> Any:
  """The running statistics after a step: they stand still in a frozen model."""
  if not attention.frozen_steps:
    return after
  moves = jnp.asarray(step) >= attention.frozen_steps
  return jax.tree.map(lambda a, b: jnp.where(moves, a, b), after, before)


def is_matrix(params: Any) -> Any:
  """A tree of bools, true for what is decayed.

  Names decide, not the rank: a norm's scale that is stacked over
  layers has two axes and is still a vector.
  """
  return jax.tree.map_with_path(sharding.is_matrix, params)
