"""The JAX programs that are timed: one head of 64, one kv head, f32.

Sparse: tiles of 256 queries read lists of at most `blocks` blocks of 64 keys:
the first one (sink), a window of 512 and the tile's own blocks, 13 together,
and the best of the rest. The number is the same at every length, as in NSA, so
every tile that has so many blocks before it reads exactly that many: 24 blocks
are 2.3 % of the 1024 at 65,536 tokens, and 4.7 % of those that causal attention
reads, of which the mean tile sees 514.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed_64k.timing import Call, lazily, timed
from psa_jax.attention import base
from psa_jax.attention import psa as psa_lib
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig
from psa_jax.kernels import block_scores
from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.kernels.decode import decode_attention
from psa_jax.kernels.dense import dense_attention

HEAD_DIM, BLOCK_Q, BLOCK_K, WINDOW = 64, 256, 64, 512
# The kernel alone is timed with these tiles too, to show what larger products
# bring; with 24 blocks they leave little to select.
LARGE_BLOCK_Q = 512
PASSES = ('forward', 'backward', 'forward+backward')
OURS_DENSE = 'psa_jax dense'
JAX_DENSE = 'jax.nn.dot_product_attention'
GEMM = 'f32 GEMM'
GEMM_SIZE = 2048


def whole(blocks: int) -> str:
  """Name of the whole operation, selection included."""
  return f'psa, {blocks} blocks'


def kernel(blocks: int, block_q: int = BLOCK_Q) -> str:
  """Name of the kernel alone, on lists that are there already."""
  tiles = '' if block_q == BLOCK_Q else f', tiles of {block_q}'
  return f'psa kernel alone, {blocks} blocks{tiles}'


def config(blocks: int, block_q: int = BLOCK_Q) -> AttentionConfig:
  """The mechanism that keeps as many of the visible blocks as fit."""
  psa = PsaConfig(
    block_q=block_q, block_k=BLOCK_K, window=WINDOW, max_blocks=blocks
  )
  return AttentionConfig(name='psa', psa=psa)


def tiles(blocks: int, settings: Sequence[int]) -> tuple[int, ...]:
  """Tiles that the kernel alone is timed with at one of the settings."""
  room = config(blocks, LARGE_BLOCK_Q).psa.forced_blocks <= blocks
  least = blocks == min(settings)
  return (BLOCK_Q, LARGE_BLOCK_Q) if least and room else (BLOCK_Q,)


def is_sparse(length: int, blocks: int) -> bool:
  """Whether so many blocks are fewer than the sequence has."""
  return blocks < -(-length // BLOCK_K)


@functools.cache
def inputs(length: int) -> tuple[jax.Array, ...]:
  """q, k, v and the gradient of the output."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (1, length, 1, HEAD_DIM)
  return tuple(jax.random.normal(key, shape, jnp.float32) for key in keys)


def attend_sparse(blocks: int, q, k, v):
  """The whole operation."""
  return base.attend(
    q, k, v, config=config(blocks), context=AttentionContext(step=jnp.int32(0))
  ).out


def attend_listed(q, k, v, ids, counts, *, block_q=BLOCK_Q):
  """The kernel alone."""
  out, _ = block_sparse_attention(
    q, k, v, ids, counts, block_q=block_q, block_k=BLOCK_K
  )
  return out


def attend_dense(q, k, v):
  """Our dense attention."""
  return dense_attention(q, k, v)[0]


def attend_jax(q, k, v):
  """What JAX ships, its default implementation."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@functools.cache
def lists(
  length: int, blocks: int, block_q: int = BLOCK_Q
) -> psa_lib.BlockList:
  """The block lists that the whole operation makes for `inputs`."""
  q, k, _, _ = inputs(length)
  cfg = config(blocks, block_q).psa
  select = jax.jit(
    functools.partial(psa_lib.select_blocks, cfg=cfg, budget=1.0)
  )
  return select(q, k)


def forward_and_backward(attend):
  """One program: the output's product with a gradient, and its gradients."""

  def loss(q, k, v, grad, *rest):
    return jnp.vdot(attend(q, k, v, *rest), grad)

  return jax.value_and_grad(loss, argnums=(0, 1, 2))


def passes(
  name: str, attend, length: int, rest=tuple
) -> dict[tuple[str, str], Call]:
  """The three passes of one operation.

  Args:
    name: of the contender.
    attend: takes q, k, v and what `rest` returns.
    length: tokens.
    rest: makes further arguments, at the first call.
  """

  def forward():
    return timed(jax.jit(attend), *inputs(length)[:3], *rest())

  def backward():
    q, k, v, grad = inputs(length)
    more, run = rest(), jax.jit(attend)
    _, pullback = jax.vjp(lambda q, k, v: run(q, k, v, *more), q, k, v)
    return timed(jax.jit(lambda pullback, grad: pullback(grad)), pullback, grad)

  def both():
    return timed(
      jax.jit(forward_and_backward(attend)), *inputs(length), *rest()
    )

  builders = zip(PASSES, (forward, backward, both), strict=True)
  return {(name, which): lazily(build) for which, build in builders}


def all_passes(
  length: int, blocks: list[int], quadratic: bool
) -> dict[tuple[str, str], Call]:
  """Everything of ours and of JAX at one length, by (name, pass).

  Args:
    length: tokens.
    blocks: settings of the sparse ones; those that would read everything are
      left out.
    quadratic: whether to include what keeps [T, T] arrays.
  """
  found = {(GEMM, 'forward'): lazily(gemm)}
  for n in (n for n in blocks if is_sparse(length, n)):
    sparse = functools.partial(attend_sparse, n)
    found |= passes(whole(n), sparse, length)
    for block_q in tiles(n, blocks):
      listed = functools.partial(lambda *at: lists(length, *at)[:2], n, block_q)
      attend = functools.partial(attend_listed, block_q=block_q)
      found |= passes(kernel(n, block_q), attend, length, listed)
  found |= passes(OURS_DENSE, attend_dense, length)
  if quadratic:
    found |= passes(JAX_DENSE, attend_jax, length)
  return found


def gemm() -> Call:
  """One f32 product of square matrices: this machine's own rate."""
  shape = (2, GEMM_SIZE, GEMM_SIZE)
  a, b = jax.random.normal(jax.random.key(1), shape, jnp.float32)
  return timed(jax.jit(jnp.dot), a, b)


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


def work(length: int, blocks: int, block_q: int = BLOCK_Q) -> Work:
  """Counts what the lists of one setting read."""
  made = lists(length, blocks, block_q)
  ids, counts, visible = (np.asarray(x)[0, 0] for x in made)
  read = np.arange(ids.shape[-1]) < counts[:, None]
  t = np.arange(len(ids) * block_q).reshape(len(ids), block_q)
  keys = t[:, :, None] - ids[:, None, :] * BLOCK_K + 1
  keys = np.clip(keys, 0, BLOCK_K) * read[:, None] * (t < length)[..., None]
  rows = np.minimum(length - t[:, 0], block_q)
  return Work(
    pairs_read=int((counts * rows).sum() * BLOCK_K),
    pairs_visible=int(keys.sum()),
    density=float(counts.sum() / visible.sum()),
    share_of_square=float(counts.sum() / (len(ids) * -(-length // BLOCK_K))),
  )


class Cache(NamedTuple):
  """One query, what is cached, and what selection keeps beside it."""

  q: jax.Array  # [B, 1, K, H]
  k: jax.Array  # [B, S, K, H]
  v: jax.Array  # [B, S, K, H]
  pooled: block_scores.Pooled
  lengths: jax.Array  # [B]


@functools.cache
def cache(length: int) -> Cache:
  """A full cache of `length` tokens; its last query decodes."""
  q, k, v, _ = inputs(length)
  pooled = block_scores.pool(k, block_k=BLOCK_K, bounds=False)
  return Cache(q[:, -1:], k, v, pooled, jnp.full((1,), length, jnp.int32))


def select_for_decode(blocks: int, at: Cache) -> tuple[jax.Array, jax.Array]:
  """Ids [B, K, M] and counts [B, K] of the blocks that the query reads.

  With tiles of one query, so that selection is paid at every step; a model
  that selects for tiles of 256 pays for it every 256 steps.
  """
  psa = dataclasses.replace(config(blocks).psa, block_q=1)
  made = psa_lib.select_for_decode(
    at.q, at.pooled, psa, positions=at.lengths - 1, budget=jnp.float32(1)
  )
  return made.ids[:, :, 0], made.counts[:, :, 0]


def decode_listed(ids, counts, at: Cache):
  """The decode kernel alone."""
  out, _ = decode_attention(
    at.q, at.k, at.v, ids, counts, at.lengths, block_k=BLOCK_K
  )
  return out


def decode_sparse(blocks: int, at: Cache):
  """The whole step: selection, then the kernel."""
  return decode_listed(*select_for_decode(blocks, at), at)


def decode_dense(at: Cache):
  """Our dense attention of one query over the cache."""
  return dense_attention(at.q, at.k, at.v, q_offset=at.k.shape[1] - 1)[0]


def decode_jax(at: Cache):
  """JAX's own attention of one query over the cache."""
  return jax.nn.dot_product_attention(at.q, at.k, at.v)


def all_decodes(length: int, blocks: list[int]) -> dict[tuple[str, str], Call]:
  """Everything of ours and of JAX that decodes, by (name, 'decode')."""

  def alone(n):
    ids, counts = jax.jit(functools.partial(select_for_decode, n))(
      cache(length)
    )
    return timed(jax.jit(decode_listed), ids, counts, cache(length))

  def step(function):
    return timed(jax.jit(function), cache(length))

  found: dict[str, Any] = {}
  for n in (n for n in blocks if is_sparse(length, n)):
    sparse = functools.partial(decode_sparse, n)
    found[whole(n)] = functools.partial(step, sparse)
    found[kernel(n)] = functools.partial(alone, n)
  found[OURS_DENSE] = functools.partial(step, decode_dense)
  found[JAX_DENSE] = functools.partial(step, decode_jax)
  return {(name, 'decode'): lazily(build) for name, build in found.items()}


def compilable(length: int, blocks) -> dict[str, Any]:
  """{name: attention of q, k, v} of what memory is accounted for."""
  found: dict[str, Any] = {
    whole(n): functools.partial(attend_sparse, n)
    for n in blocks
    if is_sparse(length, n)
  }
  return {**found, OURS_DENSE: attend_dense, JAX_DENSE: attend_jax}
