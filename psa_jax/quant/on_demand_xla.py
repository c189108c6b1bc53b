"""Attention on demand in plain XLA: two passes over tiles.

The first pass reads the high bits only. The rows that ask for more are gathered
into tiles of their own, and the second pass runs as many tiles as they fill:
none if no row asks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import softmax
from psa_jax.quant.split import scores

ROWS, KEYS = 256, 512  # of a tile of scores


class _Rows(NamedTuple):
  """Query rows of one kv head, in the order of time: [R, ...]."""

  q: jax.Array
  scale: jax.Array
  position: jax.Array
  segment: jax.Array


class _Blocks(NamedTuple):
  """Keys and values of one kv head by blocks: [blocks, keys, ...]."""

  high: jax.Array
  low: jax.Array
  scale: jax.Array
  v: jax.Array
  segment: jax.Array


def attend(whole, q_scale, keys, v, segments, *, spec):
  """Attention and what each row read.

  Args:
    whole: [B, T, N, H] integer queries.
    q_scale: [B, T, N].
    keys: `SplitKeys`.
    v: [B, S, K, Hv].
    segments: ids of queries and keys, or None.
    spec: an `on_demand.Spec`.

  Returns:
    Output [B, T, N, Hv]; whether each row read the low bits and how many keys
    it saw, both [B, K, T * G].
  """
  B, T, N, _ = whole.shape
  S, K = v.shape[1:3]
  if segments is None:
    segments = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
  q_seg, kv_seg = segments
  G, block = N // K, min(KEYS, S)

  def rows(x):  # [B, T, N, *] -> [B * K, T * G, *]
    x = jnp.moveaxis(x.reshape(B, T, K, G, *x.shape[3:]), 2, 1)
    return x.reshape(B * K, T * G, *x.shape[4:])

  def blocks(x):  # [B, S, K, *] -> [B * K, blocks, block, *]
    x = jnp.pad(x, [(0, 0), (0, -S % block)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(B * K, -1, block, *x.shape[3:])

  def every_head(x, heads):  # [B, T] -> [B, T, heads]
    return jnp.repeat(x[..., None], heads, axis=-1)

  position = jnp.arange(T, dtype=jnp.int32)[None, :, None] + spec.q_offset
  position = jnp.broadcast_to(position, (B, T, N))
  queries = _Rows(whole, q_scale, position, every_head(q_seg, N))
  cached = _Blocks(*keys, v, every_head(kv_seg, K))
  out, need, visible = lax.map(
    lambda head: _one_head(*head, spec=spec, S=S),
    (_Rows(*map(rows, queries)), _Blocks(*map(blocks, cached))),
  )
  out = jnp.moveaxis(out.reshape(B, K, T, G, -1), 1, 2)
  shape = B, K, T * G
  return out.reshape(B, T, N, -1), (need.reshape(shape), visible.reshape(shape))


def _one_head(rows, blocks, *, spec, S):
  """All rows by the high bits, then those that ask for more by all bits."""
  count = rows.q.shape[0]
  size = min(ROWS, count)
  at = jnp.arange(-(-count // size) * size).reshape(-1, size)

  def first(at):
    tile = jax.tree.map(lambda x: x[jnp.minimum(at, count - 1)], rows)
    return _tile(tile, blocks, spec=spec, S=S, whole=False)

  out, largest, visible = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[:count], lax.map(first, at)
  )
  need = (visible > 0) & (largest < spec.config.threshold)
  # Indices of the rows that ask, in the order of time; `count` is nowhere.
  place = jnp.where(need, jnp.cumsum(need) - 1, at.size)
  asking = jnp.full(at.size, count, jnp.int32)
  asking = asking.at[place].set(jnp.arange(count, dtype=jnp.int32), mode='drop')
  asking = asking.reshape(at.shape)

  def again(i, out):
    at = asking[i]
    tile = jax.tree.map(lambda x: x[jnp.minimum(at, count - 1)], rows)
    better, _, _ = _tile(tile, blocks, spec=spec, S=S, whole=True)
    return out.at[at].set(better, mode='drop')

  tiles = (need.sum() + size - 1) // size
  return lax.fori_loop(0, tiles, again, out), need, visible


def _tile(rows, blocks, *, spec, S, whole):
  """Output, largest probability and visible keys of rows in time's order."""
  count, width = blocks.scale.shape

  def step(j, carry):
    run, visible = carry
    high, low, k_scale, v, segment = jax.tree.map(lambda x: x[j], blocks)
    low = low if whole else None
    s = scores(
      rows.q, rows.scale * spec.scale, high, low, k_scale, config=spec.config
    )
    position = (j * width + jnp.arange(width))[None]
    mask = (position < S) & (rows.segment[:, None] == segment[None])
    if spec.causal:
      mask = mask & (position <= rows.position[:, None])
    s = jnp.where(mask, s, softmax.MASKED)
    return softmax.add(run, s, v), visible + mask.sum(-1, dtype=jnp.int32)

  stop = count
  if spec.causal:
    stop = jnp.clip(rows.position[-1] // width + 1, 0, count)
  size = rows.scale.shape[0]
  run = softmax.start(size, blocks.v.shape[-1], jnp.float32)
  run, visible = lax.fori_loop(0, stop, step, (run, jnp.zeros(size, jnp.int32)))
  largest = 1 / jnp.where(run.total > 0, run.total, 1)
  return softmax.finish(run, blocks.v.dtype)[0], largest, visible
