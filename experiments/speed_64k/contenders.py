"""The JAX programs that are timed: one head of 64, one kv head, f32.

Sparse: tiles of 256 queries, lists of 24, 48 or 96 blocks, 13 of which are
the sink, the window and the tile's own; see `bench/attention.py`. 24 blocks
are 2.3 % of the 1024 at 65,536 tokens, and 4.7 % of those that causal attention
reads, of which the mean tile sees 514.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import attention
from experiments.bench.attention import JAX_DENSE, Shape, Sparse
from experiments.bench.passes import passes
from experiments.bench.timing import Call, Subject, lazily, timed

BLOCK_Q, WINDOW = 256, 512
# The kernel alone is timed with these tiles too, to show what larger products
# bring; with 24 blocks they leave little to select.
LARGE_BLOCK_Q = 512
OURS_DENSE = 'psa_jax dense'
GEMM = 'f32 GEMM'
GEMM_SIZE = 2048


def whole(blocks: int) -> str:
  """Name of the whole operation, selection included."""
  return f'psa, {blocks} blocks'


def kernel(blocks: int, block_q: int = BLOCK_Q) -> str:
  """Name of the kernel alone, on lists that are there already."""
  tiles = '' if block_q == BLOCK_Q else f', tiles of {block_q}'
  return f'psa kernel alone, {blocks} blocks{tiles}'


def sparse(blocks: int, block_q: int = BLOCK_Q) -> Sparse:
  """The settings of one sparse contender."""
  return Sparse(blocks, block_q, window=WINDOW)


def tiles(blocks: int, settings: Sequence[int]) -> tuple[int, ...]:
  """Tiles that the kernel alone is timed with at one of the settings."""
  large = sparse(blocks, LARGE_BLOCK_Q).config.psa
  room = large.forced_blocks <= blocks
  least = blocks == min(settings)
  return (BLOCK_Q, LARGE_BLOCK_Q) if least and room else (BLOCK_Q,)


def is_sparse(length: int, blocks: int) -> bool:
  """Whether so many blocks are fewer than the sequence has."""
  return sparse(blocks).is_sparse(length)


def all_passes(
  length: int, blocks: Sequence[int], quadratic: bool
) -> dict[Subject, Call]:
  """Everything of ours and of JAX at one length, by (name, pass).

  Args:
    length: tokens.
    blocks: settings of the sparse ones; those that would read everything are
      left out.
    quadratic: whether to include what keeps [T, T] arrays.
  """
  shape = Shape(length)
  inputs = functools.partial(attention.inputs, shape)
  contenders: dict[Subject, Call] = {
    (GEMM, 'forward'): lazily(functools.partial(attention.gemm, GEMM_SIZE))
  }
  for n in (n for n in blocks if is_sparse(length, n)):
    attend = functools.partial(attention.attend_sparse, sparse(n))
    contenders |= passes(whole(n), attend, inputs)
    for block_q in tiles(n, blocks):
      at = sparse(n, block_q)
      attend = functools.partial(attention.attend_listed, at)
      lists = functools.partial(lambda at: attention.lists(shape, at)[:2], at)
      contenders |= passes(kernel(n, block_q), attend, inputs, lists)
  contenders |= passes(OURS_DENSE, attention.attend_dense, inputs)
  if quadratic:
    contenders |= passes(JAX_DENSE, attention.attend_jax, inputs)
  return contenders


def all_decodes(length: int, blocks: Sequence[int]) -> dict[Subject, Call]:
  """Everything of ours and of JAX that decodes, by (name, 'decode')."""

  def alone(n):
    at = attention.cache(Shape(length))
    select = functools.partial(attention.select_for_decode, sparse(n))
    lists = jax.jit(select)(at.q, at)
    return timed(jax.jit(attention.decode_listed), at.q, at, *lists)

  def step(function):
    at = attention.cache(Shape(length))
    return timed(jax.jit(function), at.q, at)

  builders: dict[str, Any] = {}
  for n in (n for n in blocks if is_sparse(length, n)):
    decode = functools.partial(attention.decode_sparse, sparse(n))
    builders[whole(n)] = functools.partial(step, decode)
    builders[kernel(n)] = functools.partial(alone, n)
  builders[OURS_DENSE] = functools.partial(step, attention.decode_dense)
  builders[JAX_DENSE] = functools.partial(step, attention.decode_jax)
  return {(name, 'decode'): lazily(build) for name, build in builders.items()}


def compilable(length: int, blocks: Sequence[int]) -> dict[str, Any]:
  """{name: attention of q, k, v} of what memory is accounted for."""
  programs: dict[str, Any] = {
    whole(n): functools.partial(attention.attend_sparse, sparse(n))
    for n in blocks
    if is_sparse(length, n)
  }
  dense = {
    OURS_DENSE: attention.attend_dense,
    JAX_DENSE: attention.attend_jax,
  }
  return programs | dense


def recipe_attention(config, length: int) -> dict[Subject, Call]:
  """One head at a recipe's last step, selection included, and dense."""
  q, k, v, _ = attention.inputs(Shape(length))
  final = one_head(config)

  def attend(mechanism, q, k, v):
    at = final if mechanism == final.name else final.read_by(mechanism)
    return attention.attend(q, k, v, config=at, step=sum(config.train.steps))

  contenders = {}
  for mechanism in ('psa', 'dense'):
    forward = jax.jit(functools.partial(attend, mechanism))
    out, pullback = jax.vjp(forward, q, k, v)
    backward = jax.jit(lambda pullback, grad: pullback(grad))
    name = f'psa_jax {mechanism}'
    contenders[name, 'forward'] = timed(forward, q, k, v)
    ones = jnp.ones_like(out)
    contenders[name, 'backward'] = timed(backward, pullback, ones)
  return contenders


def one_head(config):
  """The recipe's attention for a single head.

  A tile of the recipe has the queries of all G heads of a group as rows; one
  head gets tiles of as many rows, so G times as many queries.
  """
  model = config.model
  rows = model.attention.psa.block_q * model.num_heads // model.num_kv_heads
  psa = dataclasses.replace(model.attention.psa, block_q=rows)
  return dataclasses.replace(model.attention, name='psa', psa=psa)
