"""Decoding by block list on GPUs, by the forward kernel of block_sparse.

The T queries of the G heads of a group are the rows of one tile, padded to 64
or 128: the tensor cores have time to spare, because decoding waits
for the cache. So that a small batch uses the whole GPU, a list is dealt out to
several blocks of threads, each with its own softmax; the parts are merged
through their log-sum-exp (split-K, as in Flash-Decoding; Dao et al. 2023).

The cache is read where it is. Only if its room is not a multiple of `block_k`,
or a head's width not one of 16, a padded copy is made in every step. The blocks
at which what is read begins and ends are always copied: what lies outside may
be NaN (`pallas_gpu_forward.Edges`).

Executed so far: see `block_sparse/pallas_gpu.py`.
"""

import jax.numpy as jnp

from psa_jax.kernels import nvidia, softmax, unread
from psa_jax.kernels.block_sparse import pallas_gpu as block_sparse
from psa_jax.kernels.block_sparse.gpu_rows import QueryRows
from psa_jax.kernels.nvidia import Cores, Rows
from psa_jax.kernels.tiles import Tiles


def refusal(where, q, k, v, *lists, spec) -> str | None:
  """Why the call cannot run on `where`, or None."""
  del lists
  return nvidia.refusal(where, q, k, v, spec.block_k)


def decode_attention(q, k, v, ids, counts, lengths, starts, *, spec):
  """See `api.decode_attention`."""
  # Loads Mosaic GPU, which other machines never need.
  from psa_jax.kernels.block_sparse import pallas_gpu_forward as kernel

  tiles, width = Tiles.of(q, k, q.shape[1], spec.block_k), v.shape[-1]
  cores = Cores.for_queries(tiles.rows, spec.block_k, q, v, most=1)
  ids, counts = block_sparse.clip_lists(tiles, ids, counts)
  ids, counts = deal(ids, counts, parts=_parts(tiles, ids.shape[-1]))
  parts = ids.shape[2]
  queries = QueryRows(tiles, cores.padded(tiles.rows), packed=True)
  k, v = (block_sparse.pack_keys(tiles, nvidia.pad_width(x)) for x in (k, v))
  limits = _row_limits(tiles, cores, spec, lengths, starts)
  outs, lses = kernel.forward(
    queries.pack(nvidia.pad_width(q)),
    k,
    v,
    kernel.Lists(ids.reshape(-1, ids.shape[-1]), counts.reshape(-1), parts),
    limits,
    None,
    edges=_edges(tiles, limits, k, v),
    queries=queries,
    scale=spec.scale,
    dtype=jnp.float32,
    cores=cores,
  )

  def part(x, i):
    x = x.reshape(-1, parts, *x.shape[1:])[:, i]
    return queries.unpack(x)

  every = range(parts)
  out, lse = softmax.merge(
    [part(outs, i) for i in every], [part(lses, i) for i in every]
  )
  return out[..., :width].astype(v.dtype), lse


def _edges(tiles: Tiles, limits: Rows, k, v):
  """The first and the last block that some query of each row may read."""
  from psa_jax.kernels.block_sparse import pallas_gpu_forward as kernel

  size = tiles.block_k
  rows = slice(tiles.rows)  # padding behind them
  assert limits.low is not None
  low, high = limits.low[:, rows].min(1), limits.high[:, rows].max(1)
  at = jnp.clip(jnp.stack([low, high], 1) // size, 0, tiles.nk - 1)
  where = at[..., None] * size + jnp.arange(size)[None, None]
  where = where.reshape(tiles.B, -1, 1, 1)
  edges = (jnp.take_along_axis(x, where, axis=1) for x in (k, v))
  return kernel.Edges(at[:, 0], at[:, 1], *unread.mark(*edges))


def deal(ids, counts, *, parts: int):
  """Deals the entries of every list out in turn to `parts` shorter ones.

  Args:
    ids: [B, K, M].
    counts: [B, K].
    parts: at most M.

  Returns:
    ids [B, K, parts, ceil(M / parts)] and counts [B, K, parts], which differ
    by one at most.
  """
  B, K, M = ids.shape
  ids = nvidia.pad_axis(ids, 2, nvidia.up(M, parts))
  ids = jnp.swapaxes(ids.reshape(B, K, -1, parts), 2, 3)
  ahead = jnp.arange(parts)[None, None]
  return ids, (counts[..., None] + parts - 1 - ahead) // parts


def _parts(tiles: Tiles, M: int) -> int:
  """How many blocks of threads share a list."""
  return max(1, min(M, nvidia.BLOCKS // (tiles.B * tiles.K)))


def _row_limits(tiles: Tiles, cores: Cores, spec, lengths, starts) -> Rows:
  """`Rows` of [B, padded rows]: row `(g, t)` is query `t`."""
  t = lengths[:, None] - tiles.T + jnp.arange(tiles.T)[None]
  low = jnp.broadcast_to(starts[:, None], t.shape)
  if spec.window is not None:
    low = jnp.maximum(low, t - spec.window + 1)
  rows = cores.padded(tiles.rows)

  def pack(x, value):
    return nvidia.pad_axis(jnp.tile(x, (1, tiles.G)), 1, rows, value)

  return Rows(pack(jnp.minimum(t, tiles.S - 1), -1), pack(low, 0), None)
