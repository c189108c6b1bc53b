"""Floating-point operations of a forward pass, from sizes and what was read.

Products only, two operations each: linear layers over the tokens that are left,
and attention's two products over the pairs that it reads. What chooses the
pairs, norms and softmax are not counted, so this is a lower bound that shows
what a mechanism saves, not what a machine does; seconds stand beside it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

from psa_jax import sharding
from psa_jax.attention.projections import head_dim
from psa_jax.config import ModelConfig

_TABLES = ('embedding', 'unembedding', 'places')
# Read the mean of a window, not every token of it.
_ONCE = ('head',)


def forward(
  config: ModelConfig, params: Any, tokens: int, scalars: Mapping[str, Any]
) -> float:
  """Operations of one window.

  Args:
    config: the model.
    params: its arrays or their shapes, nested dicts.
    tokens: of the window; of an encoder_decoder, of each text.
    scalars: what the model reports: `density`, and where it has them
      `cross_density` and `kept_tokens`.
  """
  kept, density = scalars.get('kept_tokens', 1.0), scalars.get('density', 1.0)
  linear = 0.0
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = path[-1].key
    if name in _TABLES or not sharding.is_matrix(path, leaf):
      continue
    count = 1 if name in _ONCE else kept * tokens
    linear += 2 * count * math.prod(leaf.shape)
  if config.kind in ('decoder_lm', 'encoder_decoder'):
    table = params.get('unembedding', params['embedding'])
    linear += 2 * tokens * math.prod(table.shape)
  width = config.num_layers * config.num_heads * head_dim(config)
  future, every = tokens * (tokens + 1) / 2, tokens**2
  if config.kind == 'encoder_decoder':
    pairs = density * (future + every) + scalars['cross_density'] * every
  else:
    pairs = density * (future if config.kind == 'decoder_lm' else every)
  return linear + 4 * width * pairs
