"""A trained model without its norms: every one is folded into what reads it.

In a pre-norm Transformer a norm is read by linear layers only: attention's by
the queries, keys and values, the feed-forward layer's by its first matrices,
the last one by the output matrix or the head, and that of an encoder whose
output is translated by the keys and values of all layers that read it. So at
gamma = 0 each folds into a following layer (`norm/fold.py`) and the model that
is left is the same architecture with `norm.kind=none` and biases: an ordinary
configuration and ordinary parameters, which build, run and save like any other.

Refused, because something else reads the norm or the result would not be the
same: `nsa` and `dsa` (their compression, gates and indexer read it too),
quantised training (the folded weights round differently), and an encoder
without a head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from psa_jax.attention import registry
from psa_jax.config import ConfigError, ModelConfig, NormConfig
from psa_jax.norm import gamma
from psa_jax.norm.fold import ScaleShift, into_following
from psa_jax.norm.prepbn import BATCH_KINDS

Tree = dict[str, Any]


class Folded(NamedTuple):
  """A model without norms.

  Attributes:
    config: what builds it.
    params: nested dicts of arrays.
    model_state: every other array.
  """

  config: ModelConfig
  params: Tree
  model_state: Tree


def fold(
  config: ModelConfig,
  params: Mapping[str, Any],
  model_state: Mapping[str, Any],
  *,
  step: int,
) -> Folded:
  """Folds every norm of a model.

  Args:
    config: the model.
    params: its trained arrays, nested dicts.
    model_state: its running statistics, likewise.
    step: optimiser step, which says what gamma is.

  Raises:
    ConfigError: the norms do not fold, saying why.
  """
  _check(config, step, 'head' in params)
  params, model_state = _copy(params), _copy(model_state)

  for name in ('encoder_layers', 'layers'):
    if name in params:
      _fold_layers(config, params[name], model_state[name])
  if 'encoder_norm' in params:
    memory = _taken(config, params, model_state, 'encoder_norm')
    readers = params['layers']['cross']
    L = readers['wk'].shape[0]
    each = ScaleShift(*(np.broadcast_to(x, (L, *x.shape)) for x in memory))
    _following(each, readers, {'wk': 'bk', 'wv': 'bv'})
  norm = _taken(config, params, model_state, 'final_norm')
  tied = 'head' not in params and 'unembedding' not in params
  if 'head' in params:
    _following(norm, params, {'head': 'head_bias'})
  else:
    table = params['embedding' if tied else 'unembedding']
    kernel, bias = into_following(norm, table.T, params.get('unembedding_bias'))
    params |= {'unembedding': kernel.T, 'unembedding_bias': bias}
  config = dataclasses.replace(
    config, norm=NormConfig('none'), biases=True, tie_embeddings=False
  )
  return Folded(config, params, _without_empty(model_state))


def _fold_layers(config: ModelConfig, layers: Tree, state: Tree) -> None:
  """Folds the norms of stacked layers, in place, and adds what biases lack."""
  norm = _taken(config, layers, state, 'attention_norm')
  _following(norm, layers['attention'], {'wq': 'bq', 'wk': 'bk', 'wv': 'bv'})
  norm, mlp = _taken(config, layers, state, 'mlp_norm'), layers['mlp']
  _following(norm, mlp, {'w_gate': 'b_gate', 'w_up': 'b_up'})
  if 'cross' in layers:  # its keys and values read the encoder's norm
    norm = _taken(config, layers, state, 'cross_norm')
    _following(norm, layers['cross'], {'wq': 'bq'})
  if config.biases:
    return
  for name, kernel, bias in (
    ('attention', 'wo', 'bo'),
    ('cross', 'wo', 'bo'),
    ('mlp', 'w_down', 'b_down'),
  ):
    if name in layers:
      (L, *_, D), dtype = layers[name][kernel].shape, layers[name][kernel].dtype
      layers[name][bias] = np.zeros((L, D), dtype)


def _taken(config: ModelConfig, tree: Tree, state: Tree, name: str):
  """What a norm does; it is in the trees no more."""
  return ScaleShift.of(tree.pop(name), state.pop(name), config.norm.bn_eps)


def _following(norm: ScaleShift, tree: Tree, names: Mapping[str, str]) -> None:
  """Folds into the kernels of a layer that are there, in place."""
  for kernel, bias in names.items():
    if kernel in tree:
      tree[kernel], tree[bias] = into_following(
        norm, tree[kernel], tree.get(bias)
      )


def _check(config: ModelConfig, step: int, has_head: bool) -> None:
  kind = config.norm.kind
  if kind not in BATCH_KINDS:
    raise ConfigError(
      f'model.norm.kind={kind} does not fold: it needs the statistics of every '
      f'token; train with one of {", ".join(BATCH_KINDS)}'
    )
  weight = float(gamma(config.norm, step))
  if weight > 0:
    raise ConfigError(
      f'at step {step} PRepBN is still {weight:.0%} {config.norm.base}; it '
      'folds from step norm.warmup_steps + norm.decay_steps = '
      f'{config.norm.warmup_steps + config.norm.decay_steps} on'
    )
  if registry.get(config.attention.name).reads_norm:
    raise ConfigError(
      f'attention {config.attention.name} has parameters of its own that read '
      'the norm, so it does not fold'
    )
  if config.quant.enabled:
    raise ConfigError(
      'model.quant.enabled is on: folded weights would be rounded differently; '
      'turn it off to fold'
    )
  if config.kind == 'encoder' and not has_head:
    raise ConfigError('an encoder without a head keeps its last norm')


def _without_empty(tree: Tree) -> Tree:
  """The nested dicts that hold an array."""
  kept = {
    key: _without_empty(value) if isinstance(value, dict) else value
    for key, value in tree.items()
  }
  return {
    key: x for key, x in kept.items() if not (isinstance(x, dict) and not x)
  }


def _copy(tree: Mapping[str, Any]) -> Tree:
  """The nested dicts, anew; their arrays are shared."""
  return {
    key: _copy(value) if isinstance(value, Mapping) else value
    for key, value in tree.items()
  }
