"""How much attention every key received: sums over a softmax's columns.

With the log-sum-exp of `dense_attention` the probabilities can be had again,
tile by tile, so the [T, S] matrix never exists:

  column_mass  sum over heads and queries of P[n, t, s], one number a key
  self_mass    sum over heads of P[n, t, t], what a token gives to itself

They rank tokens (SpAtten, arXiv 2012.09852, Alg. 2); no gradient flows through
them. The second is the first with the sum cut to the queries that a token
knows of in a causal model: its own. It costs O(T).

Not done: kernels for accelerators; both are plain XLA on every platform.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, softmax
from psa_jax.kernels.tiles import Tiles

# Query rows of a tile, over the G heads of a group. A tile has all keys, so
# this bounds the memory: 16 MiB at 65,536 of them.
ROWS = 64


def column_mass(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  lse: Float[Array, 'B T N'],
  *,
  causal: bool,
  q_segment_ids: Int[Array, 'B T'] | None = None,
  kv_segment_ids: Int[Array, 'B S'] | None = None,
  q_offset: int = 0,
  scale: float | None = None,
  streamed: bool = True,
) -> Float[Array, 'B S']:
  """Softmax mass that every key got, summed over heads and queries.

  Args:
    q: queries, as `dense_attention` got them.
    k: keys, likewise.
    lse: what it returned.
    causal: see `dense_attention`.
    q_segment_ids: likewise.
    kv_segment_ids: likewise.
    q_offset: likewise.
    scale: likewise.
    streamed: in memory linear in S; False makes the whole matrix at once.

  Returns:
    f32; sums to N times the number of queries that read anything.
  """
  arguments.check_attention(q, k, k, q_segment_ids, kv_segment_ids)
  q, k, lse = lax.stop_gradient((q, k, lse))
  B, T, N, H = q.shape
  K = k.shape[2]
  block_q = min(max(ROWS * K // N, 1), T) if streamed else T
  tiles = Tiles.of(q, k, block_q, k.shape[1])
  # Rows of padding, and rows that read nothing, have no mass at all.
  some = tiles.pack_q((lse > -jnp.inf).astype(jnp.float32)) > 0
  rows = jnp.where(some, tiles.pack_q(lse), jnp.inf)
  shape = (B * K, tiles.nq, tiles.rows)
  qt, rows = tiles.pack_q(q).reshape(*shape, H), rows.reshape(shape)
  kb = tiles.pack_k(k)
  factor = arguments.scale_or_default(q, scale)
  segments = arguments.segments(q_segment_ids, kv_segment_ids)
  if segments is not None:
    segments = tiles.pack_segments(*segments)

  def mass(head, i, q, lse):
    """[S] of one tile."""
    s = softmax.dot('rh,sh->rs', q, kb[head], jnp.float32) * factor
    p = jnp.exp(s - lse.astype(jnp.float32)[:, None])
    mask = visible(tiles, head, i, causal, q_offset, segments)
    return (p if mask is None else jnp.where(mask, p, 0)).sum(0)

  def of_head(head):
    if not streamed:
      return mass(head, 0, qt[head, 0], rows[head, 0])

    def step(total, xs):
      return total + mass(head, *xs), None

    start = jnp.zeros(k.shape[1], jnp.float32)
    xs = jnp.arange(tiles.nq), qt[head], rows[head]
    return lax.scan(step, start, xs)[0]

  every = functools.partial(lax.map, of_head) if streamed else jax.vmap(of_head)
  sums = every(jnp.arange(B * K))
  return sums.reshape(B, K, -1).sum(1)


def visible(tiles, head, i, causal, q_offset, segments):
  """[rows, S] bool: which query of tile `i` reads which key; None if all do.

  Args:
    tiles: with all keys in one block.
    head: flat number of batch row and kv head.
    i: number of the tile among the head's.
    causal: a query reads only keys up to its own position.
    q_offset: position of the first query.
    segments: packed ids of queries and keys, or None.
  """
  tile = head * tiles.nq + i
  mask = None
  if causal:
    t = tiles.q_positions(tile, q_offset)
    mask = jnp.arange(tiles.S)[None] <= t[:, None]
  if segments is not None:
    q_seg, kv_seg = tiles.q_segments(segments[0], tile), segments[1]
    segment = q_seg[:, None] == kv_seg[head // tiles.K][None]
    mask = segment if mask is None else mask & segment
  return mask


def self_mass(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  lse: Float[Array, 'B T N'],
  *,
  scale: float | None = None,
) -> Float[Array, 'B T']:
  """Softmax mass that every token gives to its own key, summed over heads.

  Args:
    q: queries.
    k: keys of the same tokens.
    lse: log-sum-exp of the scores.
    scale: see `dense_attention`.

  Returns:
    f32, between 0 and N.
  """
  q, k, lse = lax.stop_gradient((q, k, lse))
  B, T, N, H = q.shape
  K = k.shape[2]
  grouped = q.reshape(B, T, K, N // K, H)
  s = jnp.einsum(
    'btkgh,btkh->btkg', grouped, k, preferred_element_type=jnp.float32
  )
  s = s.reshape(B, T, N) * arguments.scale_or_default(q, scale)
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse).astype(jnp.float32)
  return jnp.exp(s - lse).sum(-1)
