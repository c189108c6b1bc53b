"""The JAX programs that are timed on a GPU: bf16, a group of four heads a list.

Sparse: tiles of 64 queries, whose four heads make 256 rows, read lists of at
most 24 blocks of 64 keys; see `bench/attention.py`. 24 blocks are 2.3 % of the
1024 at 65,536 tokens, and 4.7 % of those that causal attention reads.
"""

import functools

import jax
import jax.numpy as jnp

from experiments.bench import attention
from experiments.bench.attention import JAX_DENSE, Shape, Sparse
from experiments.bench.passes import passes
from experiments.bench.timing import Call, Subject, chained, lazily, queued

SPARSE = Sparse(blocks=24, block_q=64, block_k=64, window=512)
WHOLE, KERNEL = 'psa', 'psa kernel alone'
XLA_KERNEL = 'psa kernel alone, xla'
XLA_UP_TO = 16_384  # tokens; it takes a second at 65,536
SELECTION = 'psa selection alone'
DENSE = 'dense (cuDNN)'
GEMM, GEMM_SIZE = 'bf16 GEMM', 8192
COPY, COPY_BYTES = 'copy', 2**31
# Products are made of a few heads at once, as in a model.
DECODE_BATCH = 8


def shape(length: int, head_dim: int = 128) -> Shape:
  """Sizes of one comparison."""
  return Shape(length, 16, 4, head_dim, 'bfloat16')


def all_passes(at: Shape) -> dict[Subject, Call]:
  """Everything at one length, by (name, pass)."""
  inputs = functools.partial(attention.inputs, at)
  contenders = passes(DENSE, attention.attend_dense, inputs, time=queued)
  if not SPARSE.is_sparse(at.length):
    return contenders

  def lists():
    return attention.lists(at, SPARSE)[:2]

  whole = functools.partial(attention.attend_sparse, SPARSE)
  contenders |= passes(WHOLE, whole, inputs, time=queued)
  kernels = {KERNEL: 'pallas_gpu'}
  if at.length <= XLA_UP_TO:
    kernels[XLA_KERNEL] = 'xla'
  for name, implementation in kernels.items():
    kernel = functools.partial(
      attention.attend_listed, SPARSE, implementation=implementation
    )
    contenders |= passes(name, kernel, inputs, lists, time=queued)
  select = functools.partial(attention.select, SPARSE)
  contenders[SELECTION, 'forward'] = lazily(
    lambda: queued(jax.jit(select), *inputs()[:2])
  )
  return contenders


def ceilings() -> dict[Subject, Call]:
  """What this GPU reaches: a large product, and a copy."""

  def copy():
    x = jax.random.normal(jax.random.key(1), (COPY_BYTES // 4,), jnp.float32)
    return queued(jax.jit(lambda x: x + 1), x)

  gemm = functools.partial(attention.gemm, GEMM_SIZE, 'bfloat16', queued)
  return {(GEMM, 'forward'): lazily(gemm), (COPY, 'forward'): lazily(copy)}


def all_decodes(at: Shape) -> dict[Subject, Call]:
  """Everything that decodes, by (name, 'decode')."""

  def whole(cache):
    step = functools.partial(attention.decode_sparse, SPARSE)
    return chained(step, cache.q, cache)

  def kernel(cache):
    select = functools.partial(attention.select_for_decode, SPARSE)
    lists = jax.jit(select)(cache.q, cache)
    return chained(attention.decode_listed, cache.q, cache, *lists)

  def dense(cache):
    step = functools.partial(attention.decode_dense, causal=False)
    return chained(step, cache.q, cache)

  def shipped(cache):
    return chained(attention.decode_jax, cache.q, cache)

  builders = {WHOLE: whole, KERNEL: kernel, DENSE: dense, JAX_DENSE: shipped}
  cached = functools.partial(attention.cache, at, batch=DECODE_BATCH)
  return {
    (name, 'decode'): lazily(lambda build=build: build(cached()))
    for name, build in builders.items()
  }
