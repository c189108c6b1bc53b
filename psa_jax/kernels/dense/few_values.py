"""Dense attention that reads only the values of the largest probabilities.

SpAtten's local value pruning (arXiv 2012.09852, section III.C): after the
softmax over all visible keys, every query of every head drops the values of
its smallest probabilities. What is left is not normalised again: the paper
multiplies the probabilities as they are, so the dropped mass is lost.

Which rows are kept differs from query to query, so on a machine that
multiplies tiles the product with the values is as large as before, with zeros
in it; bytes are saved only where values are fetched row by row, as in decoding
on the paper's hardware. The set is exact (ties by position) and is found for a
tile of queries at a time, in memory linear in S.

Not done: kernels for accelerators.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.config import ConfigError
from psa_jax.kernels import arguments, softmax, topk, unread
from psa_jax.kernels.dense.columns import ROWS, visible
from psa_jax.kernels.tiles import Tiles

IMPLEMENTATIONS = ('auto', 'xla', 'reference')


def few_values_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  counts: Int[Array, 'B T'],
  *,
  causal: bool = True,
  q_segment_ids: Int[Array, 'B T'] | None = None,
  kv_segment_ids: Int[Array, 'B S'] | None = None,
  scale: float | None = None,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Softmax attention with `counts` values a query and head.

  Args:
    q: queries.
    k: keys.
    v: values.
    counts: how many values a query reads, in every head; traced.
    causal: see `dense_attention`.
    q_segment_ids: likewise.
    kv_segment_ids: likewise.
    scale: likewise.
    implementation: `reference` makes the whole matrix of scores; `xla` (and
      `auto`) a tile of queries at a time.

  Returns:
    Output in the dtype of `v` and the log-sum-exp of all visible scores.

  Raises:
    ValueError: shapes that do not fit.
    ConfigError: an implementation that this op lacks.
  """
  arguments.check_attention(q, k, v, q_segment_ids, kv_segment_ids)
  if implementation not in IMPLEMENTATIONS:
    raise ConfigError(
      f'value pruning has no implementation {implementation!r}; choose from '
      f'{list(IMPLEMENTATIONS)}, or set value_keep to 1'
    )
  B, T, N, H = q.shape
  K, S = k.shape[2], k.shape[1]
  streamed = implementation != 'reference'
  tiles = Tiles.of(q, k, min(max(ROWS * K // N, 1), T) if streamed else T, S)
  segments = arguments.segments(q_segment_ids, kv_segment_ids)
  if segments is not None:
    segments = tiles.pack_segments(*segments)
  run = functools.partial(
    _tile, tiles, causal, arguments.scale_or_default(q, scale), segments
  )
  counts = jnp.broadcast_to(counts[..., None], (B, T, N))
  split = (B * K, tiles.nq, tiles.rows)
  qt = tiles.pack_q(q).reshape(*split, H)
  ct = tiles.pack_q(counts).reshape(split)
  kb, vb = tiles.pack_k(k), tiles.pack_k(v)

  def of_head(xs):
    head, q, counts, *keys = xs
    if not streamed:
      out, lse = run(head, keys, 0, q[0], counts[0])
      return out[None], lse[None]
    step = jax.checkpoint(lambda xs: run(head, keys, *xs))
    return lax.map(step, (jnp.arange(tiles.nq), q, counts))

  every = functools.partial(lax.map, of_head) if streamed else jax.vmap(of_head)
  bad = (~unread.finite(x) for x in (kb, vb))
  keys = unread.clean(kb), unread.clean(vb), *bad
  out, lse = every((jnp.arange(B * K), qt, ct, *keys))
  out = out.reshape(-1, tiles.rows, v.shape[-1]).astype(v.dtype)
  return tiles.unpack_q(out), tiles.unpack_q(lse.reshape(-1, tiles.rows))


def _tile(tiles, causal, scale, segments, head, keys, i, q, counts):
  """Output and log-sum-exp of the rows of one tile.

  `keys` are a head's keys and values, and which of them were not finite.
  """
  k, v, bad_k, bad_v = keys
  bad_q, q = ~unread.finite(q), unread.clean(q)
  s = softmax.dot('rh,sh->rs', q, k, jnp.float32) * scale
  mask = visible(tiles, head, i, causal, 0, segments)
  if mask is not None:
    s = jnp.where(mask, s, -jnp.inf)
  kept = topk.select(s, counts)
  kept = kept & (s > -jnp.inf)
  top = lax.stop_gradient(s.max(-1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0)
  e = jnp.exp(s - top)
  total = e.sum(-1, keepdims=True)
  some = total > 0
  total = jnp.where(some, total, 1)
  p = jnp.where(kept, e / total, 0).astype(v.dtype)
  out = softmax.dot('rs,sh->rh', p, v, jnp.float32)
  lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[:, 0]
  seen = bad_k[None] if mask is None else mask & bad_k[None]
  bad = (seen | (kept & bad_v[None])).any(-1) | (some[:, 0] & bad_q)
  return unread.spoil(out, bad), jnp.where(bad, jnp.nan, lse)
