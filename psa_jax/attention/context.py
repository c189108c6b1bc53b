"""What varies from call to call: one frozen value that travels through layers.

A model is called with a context, adds what it knows (rotary table, documents,
whether it is causal) and hands it on; layers, mechanisms and the cascade take
what they need. The configuration is not part of it: reading the same weights
with another mechanism is another model, made from another configuration.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int, Shaped

from psa_jax.attention.rotary import Rotary
from psa_jax.types import Scalar

_TRACED = ('step', 'segment_ids', 'mask', 'rope', 'budget')
_STATIC = ('train', 'causal')


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
  """A pytree: the first five are traced, the last two are part of its shape.

  Attributes:
    step: optimiser step, which drives every schedule.
    segment_ids: documents of packed rows, nondecreasing along T; no attention
      between different ids. None is one document a row.
    mask: tokens that count in norm statistics; None counts all.
    rope: rotary table of the positions; None turns nothing.
    budget: share of the visible keys that the mechanism may read, in place of
      its schedule (see `train.controller`).
    train: whether this is a training step: statistics move, dropout drops, and
      a mechanism with a budget of its own for evaluation does not use it.
    causal: whether a query reads only keys up to its own position.
  """

  step: Scalar = 0
  segment_ids: Int[Array, 'B T'] | None = None
  mask: Shaped[Array, 'B T'] | None = None
  rope: Rotary | None = None
  budget: Float[Array, ''] | float | None = None
  train: bool = True
  causal: bool = True


def _flatten(context: AttentionContext):
  children = tuple(
    (jax.tree_util.GetAttrKey(name), getattr(context, name)) for name in _TRACED
  )
  return children, tuple(getattr(context, name) for name in _STATIC)


def _unflatten(static, children) -> AttentionContext:
  # JAX also rebuilds trees of shardings or placeholders, which the constructor
  # would refuse.
  context = object.__new__(AttentionContext)
  values = zip((*_TRACED, *_STATIC), (*children, *static), strict=True)
  for name, value in values:
    object.__setattr__(context, name, value)
  return context


jax.tree_util.register_pytree_with_keys(AttentionContext, _flatten, _unflatten)
