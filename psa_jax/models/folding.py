"""A trained model without its norms: every one is folded into what reads it.

In a pre-norm Transformer a norm is read by linear layers only: attention's by
the queries, keys and values, the feed-forward layer's by its first matrices,
the last one by the output matrix or the head. So at gamma = 0 each folds into
a following layer (`norm/fold.py`) and the model that is left is the same
architecture with `norm.kind=none` and biases: an ordinary configuration and
ordinary parameters, which build, run and save like any other.

Refused, because something else reads the norm or the result would not be the
same: `nsa` and `dsa` (their compression, gates and indexer read it too),
quantised training (the folded weights round differently), an encoder without a
head, and an encoder_decoder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from psa_jax.config import ConfigError, ModelConfig, NormConfig
from psa_jax.norm import gamma
from psa_jax.norm.fold import ScaleShift, into_following
from psa_jax.norm.prepbn import BATCH_KINDS

# Mechanisms whose own parameters read the normalised stream.
READERS = ('nsa', 'dsa')
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

  def norm(tree, state, name):
    return ScaleShift.of(tree.pop(name), state.pop(name), config.norm.eps)

  layers, state = params['layers'], model_state['layers']
  own = norm(layers, state, 'attention_norm')
  _following(own, layers['attention'], {'wq': 'bq', 'wk': 'bk', 'wv': 'bv'})
  own, mlp = norm(layers, state, 'mlp_norm'), layers['mlp']
  _following(own, mlp, {'w_gate': 'b_gate', 'w_up': 'b_up'})
  own = norm(params, model_state, 'final_norm')
  tied = 'head' not in params and 'unembedding' not in params
  if 'head' in params:
    _following(own, params, {'head': 'head_bias'})
  else:
    table = params['embedding' if tied else 'unembedding']
    kernel, bias = into_following(own, table.T, params.get('unembedding_bias'))
    params |= {'unembedding': kernel.T, 'unembedding_bias': bias}
  if not config.biases:  # those of the layers that no norm folds into
    for tree, kernel, bias in (
      (layers['attention'], 'wo', 'bo'),
      (mlp, 'w_down', 'b_down'),
    ):
      (L, *_, D), dtype = tree[kernel].shape, tree[kernel].dtype
      tree[bias] = np.zeros((L, D), dtype)
  config = dataclasses.replace(
    config, norm=NormConfig('none'), biases=True, tie_embeddings=False
  )
  return Folded(config, params, _without_empty(model_state))


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
  if config.attention.name in READERS:
    raise ConfigError(
      f'attention {config.attention.name} has parameters of its own that read '
      'the norm, so it does not fold'
    )
  if config.quant.enabled:
    raise ConfigError(
      'model.quant.enabled is on: folded weights would be rounded differently; '
      'turn it off to fold'
    )
  if config.kind == 'encoder_decoder':
    raise ConfigError(
      'an encoder_decoder does not fold: three norms of a layer and the '
      "encoder's would each need a rule"
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
