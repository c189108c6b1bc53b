"""The JAX programs that are timed on a GPU: bf16, a group of four heads a list.

Sparse: tiles of 64 queries, whose four heads make 256 rows, read lists of at
most 24 blocks of 64 keys: the first one (sink), a window of 512, the tile's own
block, and the best of the rest. 24 blocks are 2.3 % of the 1024 at 65,536
tokens, and 4.7 % of those that causal attention reads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed_64k.contenders import (
  PASSES,
  forward_and_backward,
  is_sparse,
)
from experiments.speed_64k.timing import Call, lazily
from experiments.speed_gpu.timing import chained, queued
from psa_jax.attention import base
from psa_jax.attention import psa as psa_lib
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig
from psa_jax.kernels import block_scores
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.kernels.decode import decode_attention
from psa_jax.kernels.dense import dense_attention

BLOCK_Q, BLOCK_K, WINDOW, BLOCKS = 64, 64, 512, 24
WHOLE, KERNEL = 'psa', 'psa kernel alone'
XLA_KERNEL = 'psa kernel alone, xla'
XLA_UP_TO = 16_384  # tokens; it takes a second at 65,536
SELECTION = 'psa selection alone'
DENSE = 'dense (cuDNN)'
GEMM, GEMM_SIZE = 'bf16 GEMM', 8192
COPY, COPY_BYTES = 'copy', 2**31
# Products are made of a few heads at once, as in a model.
DECODE_BATCH = 8


class Shape(NamedTuple):
  """Sizes of one comparison: B = 1."""

  length: int
  heads: int = 16
  kv_heads: int = 4
  head_dim: int = 128


def config(blocks: int = BLOCKS, block_q: int = BLOCK_Q) -> AttentionConfig:
  """The mechanism that keeps as many of the visible blocks as fit."""
  psa = PsaConfig(
    block_q=block_q, block_k=BLOCK_K, window=WINDOW, max_blocks=blocks
  )
  return AttentionConfig(name='psa', psa=psa)


@functools.cache
def inputs(shape: Shape, batch: int = 1) -> tuple[jax.Array, ...]:
  """q, k, v and the gradient of the output."""
  keys = jax.random.split(jax.random.key(0), 4)
  heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
  return tuple(
    jax.random.normal(
      key, (batch, shape.length, n, shape.head_dim), jnp.bfloat16
    )
    for key, n in zip(keys, heads, strict=True)
  )


@functools.cache
def lists(shape: Shape) -> psa_lib.BlockList:
  """The block lists that the whole operation makes for `inputs`."""
  q, k, _, _ = inputs(shape)
  return jax.jit(_select)(q, k)


def _select(q, k):
  return psa_lib.select_blocks(q, k, config().psa, budget=1.0)


def attend_sparse(q, k, v):
  """The whole operation."""
  return base.attend(
    q, k, v, config=config(), context=AttentionContext(step=jnp.int32(0))
  ).out


def attend_listed(implementation, q, k, v, ids, counts):
  """The kernel alone."""
  out, _ = block_sparse_attention(
    q,
    k,
    v,
    ids,
    counts,
    block_q=BLOCK_Q,
    block_k=BLOCK_K,
    implementation=implementation,
  )
  return out


def attend_dense(q, k, v):
  """What JAX ships for this GPU."""
  return dense_attention(q, k, v)[0]


def passes(name, attend, shape, rest=tuple) -> dict[tuple[str, str], Call]:
  """The three passes of one operation; `rest` makes further arguments."""

  def forward():
    return queued(jax.jit(attend), *inputs(shape)[:3], *rest())

  def backward():
    q, k, v, grad = inputs(shape)
    more, run = rest(), jax.jit(attend)
    _, pull = jax.vjp(lambda q, k, v: run(q, k, v, *more), q, k, v)
    return queued(jax.jit(lambda pull, grad: pull(grad)), pull, grad)

  def both():
    return queued(
      jax.jit(forward_and_backward(attend)), *inputs(shape), *rest()
    )

  builders = zip(PASSES, (forward, backward, both), strict=True)
  return {(name, which): lazily(build) for which, build in builders}


def all_passes(shape: Shape) -> dict[tuple[str, str], Call]:
  """Everything at one length, by (name, pass)."""
  found = passes(DENSE, attend_dense, shape)
  if not is_sparse(shape.length, BLOCKS):
    return found

  def listed():
    return lists(shape)[:2]

  found |= passes(WHOLE, attend_sparse, shape)
  ways = {KERNEL: 'pallas_gpu'}
  if shape.length <= XLA_UP_TO:
    ways[XLA_KERNEL] = 'xla'
  for name, way in ways.items():
    found |= passes(name, functools.partial(attend_listed, way), shape, listed)
  found[SELECTION, 'forward'] = lazily(
    lambda: queued(jax.jit(_select), *inputs(shape)[:2])
  )
  return found


def ceilings() -> dict[tuple[str, str], Call]:
  """What this GPU reaches: a large product, and a copy."""

  def gemm():
    shape = (2, GEMM_SIZE, GEMM_SIZE)
    a, b = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    return queued(jax.jit(jnp.dot), a, b)

  def copy():
    x = jax.random.normal(jax.random.key(1), (COPY_BYTES // 4,), jnp.float32)
    return queued(jax.jit(lambda x: x + 1), x)

  return {
    (GEMM, 'forward'): lazily(gemm),
    (COPY, 'forward'): lazily(copy),
  }


def work(shape: Shape) -> dict[str, Any]:
  """What the lists of one shape read."""
  made = lists(shape)
  ids, counts, visible = (np.asarray(x)[0] for x in made)
  read = np.arange(ids.shape[-1]) < counts[..., None]
  group = shape.heads // shape.kv_heads
  t = np.arange(shape.length).reshape(-1, BLOCK_Q)[None, :, :, None]
  keys = np.clip(t - ids[:, :, None] * BLOCK_K + 1, 0, BLOCK_K)
  return {
    'pairs_read': int(counts.sum()) * BLOCK_K * BLOCK_Q * group,
    'pairs_visible': int((keys * read[:, :, None]).sum()) * group,
    'density': float(counts.sum() / visible.sum()),
  }


class Cache(NamedTuple):
  """One query a row, what is cached, and what selection keeps beside it."""

  q: jax.Array  # [B, 1, N, H]
  k: jax.Array  # [B, S, K, H]
  v: jax.Array  # [B, S, K, H]
  pooled: block_scores.Pooled
  lengths: jax.Array  # [B]


@functools.cache
def cache(shape: Shape) -> Cache:
  """Full caches of `shape.length` tokens; the last queries decode."""
  q, k, v, _ = inputs(shape, DECODE_BATCH)
  pooled = block_scores.pool(k, block_k=BLOCK_K, bounds=False)
  lengths = jnp.full((DECODE_BATCH,), shape.length, jnp.int32)
  return Cache(q[:, -1:], k, v, pooled, lengths)


def select_for_decode(q, at: Cache):
  """Ids [B, K, M] and counts [B, K]; selection is paid at every step."""
  made = psa_lib.select_for_decode(
    q,
    at.pooled,
    config(block_q=1).psa,
    positions=at.lengths - 1,
    budget=jnp.float32(1),
  )
  return made.ids[:, :, 0], made.counts[:, :, 0]


def decode_listed(q, ids, counts, at: Cache):
  """The decode kernel alone."""
  return decode_attention(
    q, at.k, at.v, ids, counts, at.lengths, block_k=BLOCK_K
  )[0]


def decode_dense(q, at: Cache):
  """Our dense attention of one query over the cache."""
  return dense_attention(q, at.k, at.v, causal=False)[0]


def decode_jax(q, at: Cache):
  """JAX's own attention of one query over the cache."""
  return jax.nn.dot_product_attention(q, at.k, at.v)


def all_decodes(shape: Shape) -> dict[tuple[str, str], Call]:
  """Everything that decodes, by (name, 'decode')."""
  made = {
    WHOLE: lambda at: chained(
      lambda q, at: decode_listed(q, *select_for_decode(q, at), at), at
    ),
    KERNEL: lambda at: chained(
      lambda q, at, ids, counts: decode_listed(q, ids, counts, at),
      at,
      *jax.jit(select_for_decode)(at.q, at),
    ),
    DENSE: lambda at: chained(decode_dense, at),
    'jax.nn.dot_product_attention': lambda at: chained(decode_jax, at),
  }
  return {
    (name, 'decode'): lazily(lambda build=build: build(cache(shape)))
    for name, build in made.items()
  }
