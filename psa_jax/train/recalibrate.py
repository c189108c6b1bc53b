"""BN recalibration: statistics of batch norms under the final weights.

The running mean follows weights that still move, so at the end of training it
is late by some steps. Here the statistics of a number of training batches are
pooled instead, as if they were one batch.

Every part of the model is there, and nothing of a batch is hidden or mixed
(`still`), as when it is used. Pictures are moved, cropped and augmented as in
training.

They are read off how far the running ones move: with momentum m a batch whose
own are b turns r into m r + (1 - m) b. So a batch's variance is its unbiased
one here too, and the pooled variance at most n / (n - 1) of that of all
positions as one batch, n of them in each.
"""

import dataclasses

import jax
import jax.numpy as jnp

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config, ConfigError
from psa_jax.data.pipeline import DataIterator
from psa_jax.norm.prepbn import BATCH_KINDS
from psa_jax.tasks import Task
from psa_jax.train.state import Program, TrainState


def still(config: Config) -> Config:
  """The run without dropout, drop path, word dropout, mixup and CutMix."""
  augment = dataclasses.replace(config.data.augment, mixup=0.0, cutmix=0.0)
  data = dataclasses.replace(config.data, augment=augment, word_dropout=0.0)
  model = dataclasses.replace(config.model, dropout=0.0, drop_path=0.0)
  return dataclasses.replace(config, data=data, model=model)


def recalibrate(
  config: Config,
  task: Task,
  program: Program,
  state: TrainState,
  batches: DataIterator,
  *,
  count: int,
) -> TrainState:
  """The state with the statistics of `count` training batches.

  Args:
    config: from `still`.
    task: of that, gives the forward pass.
    program: of that, model structure and mesh.
    state: its weights and step stay.
    batches: this process's rows of training batches.
    count: of batches.

  Raises:
    ConfigError: a model without running statistics, or one that normalises by
      them in training too, so that its activations depend on the old ones.
  """
  norm = config.model.norm
  if norm.kind not in BATCH_KINDS or norm.statistics != 'batch':
    raise ConfigError(
      f'eval.recalibrate_bn is {count}, but there is nothing to estimate with '
      f'norm.kind={norm.kind} and norm.statistics={norm.statistics}; set it to '
      '0'
    )
  old, momentum = state.model_state, norm.momentum

  @jax.jit
  def of_batch(batch):
    model = program.merge(state.params, old)
    task.loss(model, batch, AttentionContext(step=state.step))
    running = program.model_state(model)
    return jax.tree.map(
      lambda r, x: (x - momentum * r) / (1 - momentum), old, running
    )

  @jax.jit
  def add(total, statistics):
    return jax.tree.map(jnp.add, total, _powers(statistics))

  total = jax.tree.map(jnp.zeros_like, old)
  for _ in range(count):
    batch = sharding.put_batch(next(batches), program.mesh)
    total = add(total, of_batch(batch))
  pooled = _moments(jax.tree.map(lambda x: x / count, total))
  return state._replace(model_state=_only_norms(old, pooled))


def _powers(tree):
  """Mean and mean square of every norm in place of mean and variance."""
  return _norms(tree, lambda mean, var: (mean, var + mean**2))


def _moments(tree):
  """The inverse of `_powers`."""
  return _norms(
    tree, lambda mean, square: (mean, jnp.maximum(square - mean**2, 0))
  )


def _norms(tree, change):
  """Nested dicts in which `change` was applied to every norm's pair."""
  if 'mean' in tree and 'var' in tree:
    mean, var = change(tree['mean'], tree['var'])
    return {**tree, 'mean': mean, 'var': var}
  return {
    key: _norms(value, change) if isinstance(value, dict) else value
    for key, value in tree.items()
  }


def _only_norms(old, new):
  """`new` where it is of a norm; other statistics stay."""
  if 'mean' in old and 'var' in old:
    return new
  return {
    key: _only_norms(value, new[key]) if isinstance(value, dict) else value
    for key, value in old.items()
  }
