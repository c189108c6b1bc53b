"""Decoding with NSA: caches of the three branches, one token a step.

Rows have lengths of their own. A cache holds, for every row,

* keys and values of the selected branch, and of the window unless shared;
* the last l keys and values that are to be compressed, in a ring: token p
  lies at p % l;
* compressed keys and values; the m-th is added by the token that completes
  its block, at position m d + l - 1;
* the lists that were selected last, which `nsa_tile` keeps until a tile ends.

A step gives what the mechanism gives for that token in a whole sequence. It
reads the compressed keys, the selected blocks and the window, and no other
part of the cache.

Not done: a ring for the window (its cache has room for the whole sequence),
and several new tokens at once after the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.nsa import branches
from psa_jax.attention.nsa import compress as compression
from psa_jax.attention.nsa.branches import NsaConfig
from psa_jax.attention.rotary import rotate
from psa_jax.config import AttentionConfig
from psa_jax.kernels import compressed
from psa_jax.kernels.compressed import newest
from psa_jax.kernels.decode import decode_attention
from psa_jax.types import Learned, Scalar


class Cache(NamedTuple):
  """What decoding knows of the past; S is its room, R the ring's, l.

  Attributes:
    k: keys of the selected branch, and its values.
    v: see `k`.
    k_window: those of the window; None where they are shared.
    v_window: see `k_window`.
    k_ring: the last keys that are to be compressed, not rotated.
    v_ring: see `k_ring`.
    k_compressed: one a complete block, rotated.
    v_compressed: see `k_compressed`.
    ids: blocks that the current tile reads.
    counts: how many of them.
    lengths: tokens of each row.
  """

  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K Hv']
  k_window: Float[Array, 'B S K H'] | None
  v_window: Float[Array, 'B S K Hv'] | None
  k_ring: Float[Array, 'B R K H']
  v_ring: Float[Array, 'B R K Hv']
  k_compressed: Float[Array, 'B C K H']
  v_compressed: Float[Array, 'B C K Hv']
  ids: Int[Array, 'B K M']
  counts: Int[Array, 'B K']
  lengths: Int[Array, 'B']


def empty(
  k: jax.ShapeDtypeStruct | jax.Array,
  v: jax.ShapeDtypeStruct | jax.Array,
  config: AttentionConfig,
  *,
  room: int,
) -> Cache:
  """A cache of rows without tokens.

  Args:
    k: anything with the shape [B, any, K, H] and the dtype of the keys.
    v: likewise of the values.
    config: the mechanism's.
    room: S, the most tokens that a row may have.
  """
  cfg = config.nsa
  blocks = compressed.count(room, block=cfg.compress_block, stride=cfg.stride)
  width = branches.list_width(cfg, -(-room // cfg.select_block))
  batch, _, kv_heads, _ = k.shape

  def pair(length):
    shapes = ((batch, length, *x.shape[2:]) for x in (k, v))
    return [jnp.zeros(s, x.dtype) for s, x in zip(shapes, (k, v), strict=True)]

  window = (None, None) if cfg.share_kv else pair(room)
  return Cache(
    *pair(room),
    *window,
    *pair(cfg.compress_block),
    *pair(max(blocks, 1)),
    jnp.zeros((batch, kv_heads, width), jnp.int32),
    jnp.zeros((batch, kv_heads), jnp.int32),
    jnp.zeros((batch,), jnp.int32),
  )


def step(
  q: Float[Array, 'B 1 N H'],
  k: Float[Array, 'B 1 K H'],
  v: Float[Array, 'B 1 K Hv'],
  cache: Cache,
  *,
  config: AttentionConfig,
  at: Scalar,
  learned: Learned,
  starts: Int[Array, 'B'] | None = None,
  active: Bool[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'B 1 N Hv'], Cache]:
  """Adds one token a row and attends from it.

  Args:
    q: queries of the new tokens, rotated already.
    k: their keys, rotated.
    v: their values.
    cache: what is before them. Donate it to `jit`, or it is copied.
    config: names `nsa` or `nsa_tile`, as in prefill.
    at: optimiser step that n is read at, as in evaluation.
    learned: what `NsaParameters` makes of the new tokens.
    starts: position of the first token of each row's document; None means 0.
    active: rows that get a token; the others keep their state and give
      nothing of meaning. None means all.

  Returns:
    The attention output and the cache with the new tokens.
  """
  cfg = config.nsa
  if starts is None:
    starts = jnp.zeros_like(cache.lengths)
  if active is None:
    active = jnp.ones(cache.lengths.shape, bool)
  cache = _append(cache, k, v, learned, cfg, active)
  t = cache.lengths - 1
  out_c, lse = _compressed(q, cache, cfg, t, starts)
  cache = _renew_lists(q, lse, cache, config, t, starts, at, active)
  implementation = config.implementation
  out_s, _ = decode_attention(
    q,
    cache.k,
    cache.v,
    cache.ids,
    cache.counts,
    cache.lengths,
    block_k=cfg.select_block,
    starts=starts,
    implementation=implementation,
  )
  block_k = branches.WINDOW_KEYS
  keys = cache.k if cache.k_window is None else cache.k_window
  values = cache.v if cache.v_window is None else cache.v_window
  ids, counts = _window_list(cfg, t, keys.shape[1], block_k, k.shape[2])
  out_w, _ = decode_attention(
    q,
    keys,
    values,
    ids,
    counts,
    cache.lengths,
    block_k=block_k,
    window=cfg.window,
    starts=starts,
    implementation=implementation,
  )
  return branches.combine(learned.heads['gates'], out_c, out_s, out_w), cache


def prefill(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  *,
  config: AttentionConfig,
  at: Scalar,
  learned: Learned,
  lengths: Int[Array, 'B'],
  room: int,
) -> tuple[Float[Array, 'B T N Hv'], Cache]:
  """Attends over whole prompts and fills a cache with them.

  Args:
    q: queries, padded behind each row's length; rotated already.
    k: keys.
    v: values.
    config: names `nsa` or `nsa_tile`.
    at: optimiser step that n is read at.
    learned: of all tokens.
    lengths: tokens of each row, at most T.
    room: S, the most tokens that a row may have; at least T.

  Returns:
    The attention output, meaningless behind the lengths, and the cache.
  """
  cfg, T = config.nsa, k.shape[1]
  run = branches.nsa_tile if config.name == 'nsa_tile' else branches.nsa
  context = AttentionContext(step=at, train=False)
  out, _ = run(q, k, v, config=config, context=context, learned=learned)
  cache = empty(k, v, config, room=room)
  raw = compression.raw_pair(k, v, learned)
  pair = compression.compress_pair(
    *raw, learned, block=cfg.compress_block, stride=cfg.stride
  )

  def fill(whole, part):
    return whole.at[:, : part.shape[1]].set(part.astype(whole.dtype))

  # Slot i of a row's ring holds the newest token p with p % l = i.
  slot, last = jnp.arange(cfg.compress_block)[None], lengths[:, None] - 1
  place = jnp.clip(last - (last - slot) % cfg.compress_block, 0, T - 1)
  rings = [jnp.take_along_axis(x, place[..., None, None], 1) for x in raw]
  cache = cache._replace(
    k=fill(cache.k, k),
    v=fill(cache.v, v),
    k_ring=rings[0],
    v_ring=rings[1],
    k_compressed=fill(cache.k_compressed, pair[0]),
    v_compressed=fill(cache.v_compressed, pair[1]),
    lengths=lengths.astype(jnp.int32),
  )
  if not cfg.share_kv:
    cache = cache._replace(
      k_window=fill(cache.k_window, learned.heads['k_window']),
      v_window=fill(cache.v_window, learned.heads['v_window']),
    )
  if config.name == 'nsa_tile':
    cache = _lists_of_last_tile(q, cache, config, at)
  return out, cache


def _lists_of_last_tile(q, cache, config, at):
  """The lists that the first query of each row's last tile selects."""
  cfg = config.nsa
  first = jnp.maximum(cache.lengths - 1, 0) // cfg.tile * cfg.tile
  q = jnp.take_along_axis(q, first[:, None, None, None], 1)
  starts, every = jnp.zeros_like(first), cache.lengths > 0
  _, lse = _compressed(q, cache, cfg, first, starts)
  return _renew_lists(q, lse, cache, config, first, starts, at, every)


def _append(cache, k, v, learned, cfg: NsaConfig, active):
  """The cache with one token more in every active row."""
  row, S = jnp.arange(len(active)), cache.k.shape[1]
  raw = compression.raw_pair(k, v, learned)
  t = cache.lengths

  def put(whole, part, at):  # idle rows write nowhere
    at = jnp.where(active, at, whole.shape[1])
    part = part[:, 0].astype(whole.dtype)
    return whole.at[row, at].set(part, mode='drop')

  at = jnp.minimum(t, S)
  changed = dict(k=put(cache.k, k, at), v=put(cache.v, v, at))
  if cache.k_window is not None:
    heads = learned.heads
    changed['k_window'] = put(cache.k_window, heads['k_window'], at)
    changed['v_window'] = put(cache.v_window, heads['v_window'], at)
  ring = t % cfg.compress_block
  changed['k_ring'] = put(cache.k_ring, raw[0], ring)
  changed['v_ring'] = put(cache.v_ring, raw[1], ring)
  begin = t - cfg.compress_block + 1
  complete = active & (begin >= 0) & (begin % cfg.stride == 0)
  cache = cache._replace(**changed, lengths=t + active)
  return lax.cond(
    complete.any(),
    lambda: _compress(cache, learned, cfg, begin, complete),
    lambda: cache,
  )


def _compress(cache, learned, cfg, begin, complete):
  """Adds the compressed key of the blocks that just became complete."""
  size = cfg.compress_block
  place = (begin[:, None] + jnp.arange(size)[None]) % size
  k, v = (
    jnp.take_along_axis(ring, place[..., None, None], 1)
    for ring in (cache.k_ring, cache.v_ring)
  )
  sizes = dict(block=size, stride=cfg.stride)
  k = compression.compress(k, compression.network(learned, 'k'), **sizes)
  v = compression.compress(v, compression.network(learned, 'v'), **sizes)
  table = compression.rotary_table(learned)
  if table is not None:
    k = rotate(k, table)
  row = jnp.arange(len(begin))
  m = jnp.where(complete, begin // cfg.stride, cache.k_compressed.shape[1])
  return cache._replace(
    k_compressed=cache.k_compressed.at[row, m].set(k[:, 0], mode='drop'),
    v_compressed=cache.v_compressed.at[row, m].set(v[:, 0], mode='drop'),
  )


def _compressed(q, cache, cfg, t, starts):
  """Attention of one query a row to the compressed keys; output and lse.

  They are a d-th of the cache and nothing selects among them: the kernel that
  reads lists is given one that names all which exist.
  """
  rooms, K = cache.k_compressed.shape[1], cache.k.shape[2]
  block_k = min(branches.WINDOW_KEYS, rooms)
  visible = jnp.maximum(newest(t, cfg.compress_block, cfg.stride) + 1, 0)
  first = -(-starts // cfg.stride)
  counts = jnp.where(visible > 0, (visible - 1) // block_k + 1, 0)
  ids = jnp.arange(-(-rooms // block_k), dtype=jnp.int32)
  return decode_attention(
    q,
    cache.k_compressed,
    cache.v_compressed,
    jnp.broadcast_to(ids[None, None], (len(t), K, len(ids))),
    jnp.broadcast_to(counts[:, None], (len(t), K)),
    visible,
    block_k=block_k,
    starts=first,
  )


def _renew_lists(q, lse, cache, config, t, starts, at, active):
  """New lists for rows whose token begins a tile; the others keep theirs."""
  cfg = config.nsa
  tile = cfg.tile if config.name == 'nsa_tile' else 1
  begins = active & (t >= 0) & (t % tile == 0)
  width = cache.ids.shape[-1]

  def renew():
    ranges = branches.visible_blocks(cfg, t[:, None], starts[:, None])
    ids = compressed.top_blocks(
      q,
      cache.k_compressed,
      lse,
      t[:, None],
      ranges,
      block=cfg.compress_block,
      stride=cfg.stride,
      select_block=cfg.select_block,
      blocks=-(-cache.k.shape[1] // cfg.select_block),
      width=width,
      starts=starts[:, None],
      implementation=branches.own_kernel(config),
    )[:, :, 0]
    budget = branches.blocks_at(cfg, at, train=False)
    counts = branches.count_blocks(cfg, ranges, budget, width)
    counts = jnp.broadcast_to(counts, cache.counts.shape)
    return cache._replace(
      ids=jnp.where(begins[:, None, None], ids, cache.ids),
      counts=jnp.where(begins[:, None], counts, cache.counts),
    )

  return lax.cond(begins.any(), renew, lambda: cache)


def _window_list(cfg, t, room, block_k, kv_heads):
  """Lists of the blocks that hold the last `window` keys."""
  low = jnp.maximum(t - cfg.window + 1, 0) // block_k
  width = min((cfg.window - 2) // block_k + 2, -(-room // block_k))
  ids = low[:, None] + jnp.arange(max(width, 1))[None]
  counts = jnp.maximum(t, 0) // block_k - low + 1
  B = len(t)
  return (
    jnp.broadcast_to(ids[:, None], (B, kv_heads, ids.shape[1])),
    jnp.broadcast_to(counts[:, None], (B, kv_heads)),
  )
