"""What masks and lengths say of the rows of self-attention.

A mechanism that picks keys cannot obey any mask. It knows documents: stretches
of a row that do not see each other. A mask that says no more than that is
translated; any other is refused, or where its values are not known yet, under
`jit`, marked, so that the output is NaN rather than wrong.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from psa_jax.config import ConfigError


class Rows(NamedTuple):
  """What counts of every row.

  Attributes:
    segment_ids: [B, T] documents, nondecreasing; None is one a row.
    real: [B, T] tokens that count; the output of others is 0. None: all.
    refused: [B, T] tokens whose mask could not be obeyed; None: no token.
  """

  segment_ids: jax.Array | None = None
  real: jax.Array | None = None
  refused: jax.Array | None = None

  def apply(self, out: jax.Array) -> jax.Array:
    """`out` [B, T, N, H] with zeros and NaN where there is nothing to say."""
    if self.real is not None:
      out = jnp.where(self.real[..., None, None], out, 0)
    if self.refused is not None:
      out = jnp.where(self.refused[..., None, None], jnp.nan, out)
    return out


def of_mask(
  mask: jax.Array,
  kind: str,
  batch: int,
  length: int,
  *,
  causal: bool,
  is_causal: bool,
) -> Rows:
  """The documents that a mask describes.

  Args:
    mask: [B or 1, 1, T or 1, S] bool, true where a query reads a key.
    kind: of the mechanism, for messages.
    batch: B.
    length: T, which is S.
    causal: whether the mechanism reads only what is before a query.
    is_causal: whether the mask stands beside a causal one; if not, and the
      mechanism is causal, it has to be causal itself.

  Raises:
    ConfigError: what it says is more than documents and causality.
  """
  if mask.shape[1] != 1:
    raise ConfigError(
      f'mask {mask.shape} differs by head, but the heads of kind={kind!r} that '
      "share a key read the same; give a mask [B, 1, T, S], or use kind='dense'"
    )
  shape = mask.shape
  mask = jnp.broadcast_to(mask[:, 0] != 0, (batch, length, length))
  past = jnp.tril(jnp.ones((length, length), bool))[None]
  if is_causal:
    mask = mask & past
  # A token that does not see itself is padding.
  real = jnp.diagonal(mask, axis1=1, axis2=2)
  first = jnp.argmax(mask, -1)
  last = length - 1 - jnp.argmax(mask[..., ::-1], -1)
  start = jnp.where(real, first, -1)
  expected = start[:, :, None] == start[:, None, :]
  if causal:
    expected = expected & past
  # The same document twice, with padding between, is not one stretch.
  whole = mask.sum(-1) == last - first + 1
  refused = real & ~(whole & (mask == expected).all(-1))
  changes = jnp.pad(start[:, 1:] != start[:, :-1], ((0, 0), (1, 0)))
  segment_ids = jnp.cumsum(changes.astype(jnp.int32), -1)
  hint = '' if is_causal or not causal else ', or pass is_causal=True'
  problem = (
    f'mask {shape}: kind={kind!r} knows documents and '
    f'{"" if causal else "no "}causality, and this mask says more; '
    f"use kind='dense'{hint}"
  )
  return Rows(segment_ids, real, _known(refused, problem))


def of_lengths(
  queries: jax.Array | None,
  keys: jax.Array | None,
  kind: str,
  length: int,
  *,
  causal: bool,
) -> Rows:
  """The rows that sequence lengths describe; the rest is padding.

  Args:
    queries: [B] `query_seq_lengths`, or None.
    keys: [B] `key_value_seq_lengths`, or None.
    kind: of the mechanism, for messages.
    length: T.
    causal: whether queries read only what is before them.

  Raises:
    ConfigError: lengths that self-attention cannot have.
  """
  at = jnp.arange(length)[None]
  if queries is None:
    raise ConfigError(
      f'key_value_seq_lengths without query_seq_lengths: kind={kind!r} reads '
      'one sequence a row; give both'
    )
  if keys is None and causal:
    return Rows(None, at < queries[:, None])
  if keys is None:
    raise ConfigError(
      'query_seq_lengths without key_value_seq_lengths: a bidirectional '
      f'kind={kind!r} reads one sequence a row; give both'
    )
  real = at < queries[:, None]
  differ = jnp.broadcast_to((queries != keys)[:, None], real.shape) & real
  problem = (
    'query_seq_lengths and key_value_seq_lengths differ, but '
    f'kind={kind!r} reads one sequence a row; make them equal'
  )
  return Rows((~real).astype(jnp.int32), real, _known(differ, problem))


def _known(refused: jax.Array, problem: str) -> jax.Array | None:
  """Raises where values are known, else returns the tokens to mark."""
  if isinstance(refused, Tracer):
    return refused
  if refused.any():
    raise ConfigError(problem)
  return None
