"""Attention as benchmarks time it: inputs, block lists, decoding, work.

A sparse contender reads, for a tile of `block_q` queries, at most `blocks`
blocks of `block_k` keys: the first one (sink), a window, the tile's own blocks,
and the best of the rest. The number is the same at every length, as in NSA, so
every tile that has so many blocks before it reads exactly that many.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import Call, timed
from psa_jax.attention import attend as attend_by_name
from psa_jax.attention import psa as psa_lib
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig
from psa_jax.kernels import block_scores
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.kernels.decode import decode_attention
from psa_jax.kernels.dense import dense_attention

JAX_DENSE = 'jax.nn.dot_product_attention'


class Shape(NamedTuple):
  """Sizes of one comparison, a row at a time."""

  length: int
  heads: int = 1
  kv_heads: int = 1
  head_dim: int = 64
  dtype: str = 'float32'


class Sparse(NamedTuple):
  """Settings of a sparse contender."""

  blocks: int
  block_q: int
  block_k: int = 64
  window: int = 512

  @property
  def config(self) -> AttentionConfig:
    """The mechanism that keeps as many of the visible blocks as fit."""
    psa = PsaConfig(
      block_q=self.block_q,
      block_k=self.block_k,
      window=self.window,
      max_blocks=self.blocks,
    )
    return AttentionConfig(name='psa', psa=psa)

  def is_sparse(self, length: int) -> bool:
    """Whether so many blocks are fewer than the sequence has."""
    return self.blocks < -(-length // self.block_k)


@functools.cache
def inputs(shape: Shape, batch: int = 1) -> tuple[jax.Array, ...]:
  """q, k, v and the gradient of the output, [batch, T, heads, H]."""
  keys = jax.random.split(jax.random.key(0), 4)
  heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
  return tuple(
    jax.random.normal(
      key, (batch, shape.length, n, shape.head_dim), jnp.dtype(shape.dtype)
    )
    for key, n in zip(keys, heads, strict=True)
  )


def attend(
  q, k, v, *, config: AttentionConfig, step: int = 0, learned=None
) -> jax.Array:
  """Any mechanism, at one step of its schedules."""
  return attend_by_name(
    q,
    k,
    v,
    config=config,
    learned=learned,
    context=AttentionContext(step=jnp.int32(step)),
  ).out


def attend_sparse(sparse: Sparse, q, k, v) -> jax.Array:
  """The whole operation, selection included."""
  return attend(q, k, v, config=sparse.config)


def attend_listed(
  sparse: Sparse, q, k, v, ids, counts, *, implementation: str = 'auto'
) -> jax.Array:
  """The kernel alone, on lists that are there already."""
  out, _ = block_sparse_attention(
    q,
    k,
    v,
    ids,
    counts,
    block_q=sparse.block_q,
    block_k=sparse.block_k,
    implementation=implementation,
  )
  return out


def attend_dense(q, k, v) -> jax.Array:
  """Our dense attention; on a GPU what JAX ships for it."""
  return dense_attention(q, k, v)[0]


def attend_jax(q, k, v) -> jax.Array:
  """What JAX ships, its default implementation."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def select(sparse: Sparse, q, k) -> psa_lib.BlockList:
  """The lists of all tiles, at the full budget."""
  return psa_lib.select_blocks(q, k, sparse.config.psa, budget=1.0)


@functools.cache
def lists(shape: Shape, sparse: Sparse) -> psa_lib.BlockList:
  """The block lists that the whole operation makes for `inputs`."""
  q, k, _, _ = inputs(shape)
  return jax.jit(functools.partial(select, sparse))(q, k)


class Work(NamedTuple):
  """How much a sparse operation reads.

  Attributes:
    pairs_read: products of a query and a key that lists and tiles ask for.
    pairs_visible: those of them that causality does not mask.
    density: blocks read as a share of those that causal attention reads.
    share_of_square: blocks read as a share of all tiles x blocks.
  """

  pairs_read: int
  pairs_visible: int
  density: float
  share_of_square: float


def work(shape: Shape, sparse: Sparse) -> Work:
  """Counts what the lists of one setting read, all heads together."""
  T, block_q, block_k = shape.length, sparse.block_q, sparse.block_k
  group = shape.heads // shape.kv_heads
  # ids [K, tiles, M]; counts and visible [K, tiles]
  ids, counts, visible = (np.asarray(x)[0] for x in lists(shape, sparse))
  tiles = ids.shape[1]
  t = np.arange(tiles * block_q).reshape(tiles, block_q)
  read = np.arange(ids.shape[-1]) < counts[..., None]
  keys = np.clip(t[:, :, None] - ids[:, :, None] * block_k + 1, 0, block_k)
  keys = keys * read[:, :, None] * (t < T)[..., None]
  queries = np.minimum(T - t[:, 0], block_q)
  square = counts.size * -(-T // block_k)
  return Work(
    pairs_read=int((counts * queries).sum() * block_k * group),
    pairs_visible=int(keys.sum() * group),
    density=float(counts.sum() / visible.sum()),
    share_of_square=float(counts.sum() / square),
  )


class Cache(NamedTuple):
  """Full caches, what selection keeps beside them, and their last queries."""

  q: jax.Array  # [B, 1, N, H]
  k: jax.Array  # [B, S, K, H]
  v: jax.Array  # [B, S, K, H]
  pooled: block_scores.Pooled
  lengths: jax.Array  # [B]


@functools.cache
def cache(shape: Shape, block_k: int = 64, batch: int = 1) -> Cache:
  """Caches of `shape.length` tokens; the last query of each decodes."""
  q, k, v, _ = inputs(shape, batch)
  pooled = block_scores.pool(k, block_k=block_k, bounds=False)
  lengths = jnp.full((batch,), shape.length, jnp.int32)
  return Cache(q[:, -1:], k, v, pooled, lengths)


def clear() -> None:
  """Forgets arrays and lists: the next length needs the memory."""
  for cached in (inputs, lists, cache):
    cached.cache_clear()


def select_for_decode(
  sparse: Sparse, q, at: Cache
) -> tuple[jax.Array, jax.Array]:
  """Ids [B, K, M] and counts [B, K] of the blocks that the query reads.

  With tiles of one query, so that selection is paid at every step; a model
  that selects for tiles of 256 pays for it every 256 steps.
  """
  chosen = psa_lib.select_for_decode(
    q,
    at.pooled,
    sparse._replace(block_q=1).config.psa,
    positions=at.lengths - 1,
    budget=jnp.float32(1),
  )
  return chosen.ids[:, :, 0], chosen.counts[:, :, 0]


def decode_listed(q, at: Cache, ids, counts, *, block_k: int = 64) -> jax.Array:
  """The decode kernel alone."""
  return decode_attention(
    q, at.k, at.v, ids, counts, at.lengths, block_k=block_k
  )[0]


def decode_sparse(sparse: Sparse, q, at: Cache) -> jax.Array:
  """The whole step: selection, then the kernel."""
  chosen = select_for_decode(sparse, q, at)
  return decode_listed(q, at, *chosen, block_k=sparse.block_k)


def decode_dense(q, at: Cache, *, causal: bool = True) -> jax.Array:
  """Our dense attention of the last query over the cache.

  Not causal is the same for a single query, and cuDNN has no offset.
  """
  offset = at.k.shape[1] - 1 if causal else 0
  return dense_attention(q, at.k, at.v, causal=causal, q_offset=offset)[0]


def decode_jax(q, at: Cache) -> jax.Array:
  """JAX's own attention of one query over the cache."""
  return jax.nn.dot_product_attention(q, at.k, at.v)


def gemm(size: int, dtype: str = 'float32', time=timed) -> Call:
  """One product of square matrices: this machine's own rate."""
  shape = (2, size, size)
  a, b = jax.random.normal(jax.random.key(1), shape, jnp.dtype(dtype))
  return time(jax.jit(jnp.dot), a, b)
