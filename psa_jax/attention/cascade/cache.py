"""Cascade pruning while decoding: a cache that loses what got no attention.

In generation every step adds one query, and SpAtten (arXiv 2012.09852, Alg. 2)
goes on adding its probabilities to the importance of the cached tokens:

  out, cache = attend(q, append(cache, k, v))
  cache = prune(cache, counts, room=...)    every so often

Whatever is summed is in the past of the tokens to come, so this is the paper's
rule, sums over columns, without the causal model's substitute. `prune` gathers
the survivors into a cache with less room: their bytes are gone. The importance
may start from a prompt's column sums (`kernels.dense.columns.column_mass`).

A token that a layer dropped must not return in a later one: give `prune` the
table of positions that the layer in front still holds (`held`).

The newest tokens have had few queries to be seen by, their sums are small for
no fault of theirs; `recent` of them always stay. The paper says nothing of it;
0 is its rule.

Not done: choosing the shares (see `survivors.layer_shares`), heads.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from psa_jax.attention.cascade.survivors import compact
from psa_jax.kernels import topk
from psa_jax.kernels.decode import decode_attention

BLOCK = 64  # cached keys that are read at a time


class PrunedCache(NamedTuple):
  """Keys and values of the tokens that are left, oldest first.

  Attributes:
    k: keys, rotated by the position that each token had.
    v: values.
    positions: of each token in its sequence.
    importance: softmax mass that it has got, over all heads and queries.
    lengths: tokens in the cache; the rest is room.
  """

  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K Hv']
  positions: Int[Array, 'B S']
  importance: Float[Array, 'B S']
  lengths: Int[Array, 'B']


def append(
  cache: PrunedCache,
  k: Float[Array, 'B 1 K H'],
  v: Float[Array, 'B 1 K Hv'],
  positions: Int[Array, 'B'],
) -> PrunedCache:
  """Adds a token to every row; without room it is lost.

  Args:
    cache: with room.
    k: rotated keys.
    v: values.
    positions: of the new tokens.
  """
  rows, at = jnp.arange(k.shape[0]), cache.lengths
  return PrunedCache(
    cache.k.at[rows, at].set(k[:, 0].astype(cache.k.dtype), mode='drop'),
    cache.v.at[rows, at].set(v[:, 0].astype(cache.v.dtype), mode='drop'),
    cache.positions.at[rows, at].set(positions, mode='drop'),
    cache.importance.at[rows, at].set(0, mode='drop'),
    jnp.minimum(at + 1, cache.k.shape[1]),
  )


def attend(
  q: Float[Array, 'B 1 N H'],
  cache: PrunedCache,
  *,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B 1 N Hv'], PrunedCache]:
  """Attention of the newest token, whose mass the cached ones are credited.

  Args:
    q: rotated queries.
    cache: with the newest token in it.
    implementation: of `decode_attention`.

  Returns:
    The output, and the cache with its importance.
  """
  B, S, K, H = cache.k.shape
  blocks = -(-S // BLOCK)
  ids = jnp.arange(blocks, dtype=jnp.int32)[None, None]
  out, lse = decode_attention(
    q,
    cache.k,
    cache.v,
    jnp.broadcast_to(ids, (B, K, blocks)),
    jnp.full((B, K), blocks, jnp.int32),
    cache.lengths,
    block_k=BLOCK,
    implementation=implementation,
  )
  grouped = q[:, 0].reshape(B, K, -1, H)
  s = jnp.einsum(
    'bkgh,bskh->bkgs', grouped, cache.k, preferred_element_type=jnp.float32
  )
  lse = lse[:, 0].reshape(B, K, -1, 1)
  p = jnp.exp(s * H**-0.5 - jnp.where(lse == -jnp.inf, jnp.inf, lse))
  p = jnp.where(_real(cache), p.sum((1, 2)), 0)
  return out, cache._replace(importance=cache.importance + p)


def prune(
  cache: PrunedCache,
  counts: Int[Array, 'B'],
  *,
  room: int,
  recent: int = 1,
  held: Bool[Array, 'B P'] | None = None,
) -> PrunedCache:
  """Keeps the most important tokens of every row, in their order.

  Args:
    cache: what there is.
    counts: how many stay, traced; at most `room`.
    room: S of the result (static), with room for the tokens to come.
    recent: the newest tokens, which stay before any other.
    held: which positions the layer in front of this one holds; others go.

  Returns:
    A smaller cache; ties by age, the older one stays.
  """
  S = cache.k.shape[1]
  real = _real(cache)
  age = cache.lengths[:, None] - jnp.arange(S)[None]
  score = jnp.where(age <= recent, jnp.inf, cache.importance)
  if held is not None:
    real = real & jnp.take_along_axis(
      held, jnp.clip(cache.positions, 0, held.shape[1] - 1), axis=1
    )
  score = jnp.where(real, score, -jnp.inf)
  counts = jnp.minimum(jnp.minimum(counts, room), real.sum(1))
  at, alive = compact(topk.select(score, counts), room)
  pad = ((0, 0), (0, room - at.shape[1]))
  at, alive = jnp.pad(at, pad), jnp.pad(alive, pad)

  def take(x):
    where = at.reshape(at.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, where, axis=1)

  return PrunedCache(
    take(cache.k),
    take(cache.v),
    take(cache.positions),
    jnp.where(alive, take(cache.importance), 0),
    alive.sum(1).astype(cache.lengths.dtype),
  )


def _real(cache: PrunedCache) -> Bool[Array, 'B S']:
  """Which entries hold a token."""
  return jnp.arange(cache.k.shape[1])[None] < cache.lengths[:, None]
