"""The cut of a row on a TPU: bisection of the integer images inside VMEM.

A block of eight rows is read from HBM once and stays in VMEM while a while
loop halves the range of their cuts, eight rows side by side. Mosaic has no
sort. A count is one load, one compare and one add a vector register; the loop
ends when the counts of all eight rows hit k or their ranges are empty, after
at most 32 counts, 20 to 27 on normal data. Where more entries equal the cut
than there is room for, a second bisection, over positions, finds the last one.

Only the cut is made here, two numbers a row; mask and compaction are XLA's
(`words.py`). Under a mesh, call inside `shard_map` with whole rows a shard:
XLA cannot partition a Mosaic kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import platform
from psa_jax.kernels.topk import image

ROWS = 8  # the sublanes of a register
LANES = 128
MAX_CHUNK = 32  # registers counted in one straight line of code
ACCUMULATORS = 4  # sums side by side, so that an add need not wait
# Two buffers of a block must fit the 16 MiB that a kernel gets by default.
MAX_N = 12 * 2**20 // (2 * ROWS * 4)
EXPECTED_COUNTS = 24


def refusal(where, keys, k, *, spec) -> str | None:
  """Why the kernel cannot run there, or None."""
  del k, spec
  if where.platform != 'tpu':
    return f'it is a Mosaic kernel for TPUs and the target is {where.platform}'
  if keys.shape[1] > MAX_N:
    return (
      f'rows of {keys.shape[1]} entries do not fit VMEM; at most {MAX_N} do'
    )
  return None


def cut(keys, k, *, spec):
  """See `xla.cut`."""
  del spec
  R, n = keys.shape
  chunk = LANES * min(MAX_CHUNK, -(-n // LANES))
  keys = jnp.pad(
    keys,
    ((0, -R % ROWS), (0, -n % chunk)),
    constant_values=image.LOWEST,
  )
  k = jnp.pad(k, (0, -R % ROWS), constant_values=1)[:, None]
  padded, width = keys.shape
  narrow = pl.BlockSpec((ROWS, 1), lambda i: (i, 0))
  one = jax.ShapeDtypeStruct((padded, 1), jnp.int32)
  at, last = pl.pallas_call(
    functools.partial(_kernel, chunk=chunk),
    grid=(padded // ROWS,),
    in_specs=[narrow, pl.BlockSpec((ROWS, width), lambda i: (i, 0))],
    out_specs=[narrow, narrow],
    out_shape=[one, one],
    cost_estimate=pl.CostEstimate(
      flops=2 * EXPECTED_COUNTS * padded * width,
      bytes_accessed=4 * padded * width,
      transcendentals=0,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=platform.current().interpret,
    name='topk_cut',
  )(k, keys)
  return at[:R, 0], last[:R, 0]


def _kernel(k_ref, keys_ref, at_ref, last_ref, *, chunk):
  k = k_ref[...]
  fold = functools.partial(_fold, keys_ref, chunk=chunk)
  low = _lanes(jnp.min, fold(jnp.minimum, lambda x, _: x))
  high = _lanes(jnp.max, fold(jnp.maximum, lambda x, _: x))

  def count(test):
    ones = fold(jnp.add, lambda x, p: jnp.where(test(x, p), 1, 0))
    return _lanes(jnp.sum, ones)

  def reach(bound):
    bound = _wide(bound)
    return count(lambda x, _: x >= bound)

  low, total = _bisect(reach, k, low, high, jnp.full_like(k, keys_ref.shape[1]))
  bound, largest = _wide(low), jnp.iinfo(jnp.int32).max
  at = _lanes(
    jnp.min,
    fold(jnp.minimum, lambda x, _: jnp.where(x >= bound, x, largest)),
  )
  at_ref[...] = at
  last_ref[...] = jnp.full_like(k, keys_ref.shape[1])

  @pl.when(_any(total > k))
  def _():
    wide = _wide(at)
    room = k - count(lambda x, _: x > wide)
    last_ref[...] = _nth_equal(count, wide, room, keys_ref.shape[1])


def _bisect(reach, k, low, high, count):
  """The bound that k entries reach, or the largest that more do; its count."""

  def unfinished(state):
    low, high, count = state
    return _any((count > k) & (low < high))

  def halve(state):
    low, high, count = state
    middle = image.middle(low, high)
    trial = reach(middle)
    up = trial >= k
    low = jnp.where(up, middle, low)
    high = jnp.where(up, high, middle - 1)
    return low, high, jnp.where(up, trial, count)

  low, _, count = lax.while_loop(unfinished, halve, (low, high, count))
  return low, count


def _nth_equal(count, wide, room, n):
  """The smallest position up to which `room` entries equal the cut."""

  def halve(_, state):
    low, high = state
    middle = (low + high) >> 1
    end = _wide(middle)
    enough = count(lambda x, p: (x == wide) & (p <= end)) >= room
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  start = jnp.zeros_like(room), jnp.full_like(room, n - 1)
  return lax.fori_loop(0, (n - 1).bit_length(), halve, start)[1]


def _fold(keys_ref, combine, term, *, chunk):
  """[ROWS, LANES]: `term(keys, positions)` of all registers, combined."""
  lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

  def registers(start):
    for offset in range(0, chunk, LANES):
      at = pl.ds(pl.multiple_of(start + offset, LANES), LANES)
      yield term(keys_ref[:, at], lane + (start + offset))

  def step(i, sums):
    sums = list(sums)
    for number, value in enumerate(registers(i * chunk)):
      slot = number % len(sums)
      sums[slot] = combine(sums[slot], value)
    return tuple(sums)

  # The first registers start the sums; minima and maxima may see them twice.
  zero = jnp.zeros((ROWS, LANES), jnp.int32)
  if combine is not jnp.add:
    zero = term(keys_ref[:, :LANES], lane)
  steps = keys_ref.shape[1] // chunk
  sums = lax.fori_loop(0, steps, step, (zero,) * ACCUMULATORS)
  return functools.reduce(combine, sums)


def _lanes(reduce, x):
  """[ROWS, LANES] -> [ROWS, 1]."""
  return reduce(x, axis=1, keepdims=True)


def _wide(x):
  """[ROWS, 1] -> [ROWS, LANES]."""
  return jnp.broadcast_to(x, (ROWS, LANES))


def _any(x):
  """Scalar bool of a [ROWS, 1] bool."""
  return jnp.max(jnp.where(x, 1, 0)) > 0
