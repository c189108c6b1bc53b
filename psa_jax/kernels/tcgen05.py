"""Products on Blackwell: operands in shared memory, sums in tensor memory.

The tensor cores work by themselves. One thread starts a product; it has ended
when it arrives at a barrier. They read the left operand from shared or, with
128 rows, from tensor memory, the right one from shared memory, and add into
tensor memory: 128 lanes of 512 columns of 32 bits. A warpgroup loads from it
into registers and stores to it.

The forward kernel begins the scores of the next block before the softmax of
this one, and two warpgroups share a multiprocessor, so that one's products run
during the other's softmax.

Not done: the former in the gradients, for which tensor memory has no room;
products of two multiprocessors together (`collective`); leaving out the
rescaling of a sum where no row found a larger score.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import tcgen05
from jax.experimental.pallas import mosaic_gpu as plgpu

from psa_jax.kernels import nvidia
from psa_jax.kernels import warpgroups as wg

CHUNK = 32  # columns of 128 rows of a sum that are rescaled at a time


class Products(NamedTuple):
  """The products of one warpgroup, and its memory for them.

  A sum is carried through the kernel's loop as a value, as `wgmma.py` needs
  it; here the value is empty and the sum is where its name says.

  Attributes:
    sizes: see `Sizes`.
    scored: tensor memory of `scores`.
    lhs: where a left operand goes that is in registers.
    sums: tensor memory by name.
    done: barriers at which scores and products into sums arrive.
  """

  sizes: wg.Sizes
  scored: Any
  lhs: Any
  sums: dict[str, Any]
  done: Any

  @staticmethod
  def scratch(sizes: wg.Sizes):
    """What to allocate for all warpgroups of a block of threads."""
    cores, width = sizes.cores, sizes.columns
    if cores.rows == nvidia.ROWS:
      lhs = wg.tile_memory(
        (cores.computing, cores.rows, width), sizes.dtype, sizes.elements
      )
    else:
      shape = (cores.rows, cores.computing * width)
      lhs = plgpu.TMEM(shape, sizes.dtype, packed=True)
    return dict(
      scored=_memory(cores, width),
      lhs=lhs,
      sums={name: _memory(cores, n) for name, n in sizes.sums.items()},
      done=tuple(
        plgpu.Barrier(num_barriers=cores.computing, orders_tensor_core=True)
        for _ in range(2)
      ),
    )

  @classmethod
  def of(cls, sizes: wg.Sizes, scratch, me) -> 'Products':
    """Those of warpgroup `me`."""

    def mine(ref, width):
      return ref.at[:, pl.ds(me * width, width)]

    in_shared = sizes.cores.rows == nvidia.ROWS
    lhs = scratch['lhs']
    return cls(
      sizes,
      mine(scratch['scored'], sizes.columns),
      lhs.at[me] if in_shared else mine(lhs, sizes.columns),
      {name: mine(scratch['sums'][name], n) for name, n in sizes.sums.items()},
      tuple(x.at[me] for x in scratch['done']),
    )

  @property
  def ahead(self) -> bool:
    """Whether to begin scores before they are needed."""
    return self.sizes.ahead

  def begin(self, condition, a, b) -> None:
    """Starts the f32 product a @ b.T of tiles in shared memory, if wanted."""

    @pl.when(condition)
    def _():
      self._begin(a, b)

  def _begin(self, a, b) -> None:
    plgpu.tcgen05_mma(
      self.scored, a, b.transpose((1, 0)), self.done[0], accumulate=False
    )

  def take(self, begun) -> jax.Array:
    """Waits for what was begun."""
    del begun
    plgpu.barrier_wait(self.done[0])
    scores = plgpu.async_load_tmem(self.scored)
    # The next product may overwrite it.
    plgpu.wait_load_tmem()
    return scores

  def meanwhile(self, condition, a, b, work):
    """What `work()` returns; begins another product before it."""
    self.begin(condition, a, b)
    return work(), None

  def scores(self, a, b) -> jax.Array:
    """The f32 product a @ b.T of tiles in shared memory."""
    self._begin(a, b)
    return self.take(None)

  def both_scores(self, first, second, then):
    """`then(a @ b.T)` and the second pair's product, one after the other."""
    return then(self.scores(*first)), self.scores(*second)

  def zero(self, name: str) -> None:
    """A sum of nothing."""
    ref = self.sums[name]
    zeros = wg.in_layout(jnp.zeros(ref.shape, jnp.float32), self.sizes.cores)
    plgpu.async_store_tmem(ref, zeros)
    plgpu.commit_tmem()

  def scaled(self, name: str, total, factor) -> None:
    """The sum with its rows multiplied by `factor` [rows]."""
    cores, sums = self.sizes.cores, self.sums[name]
    # 64 rows are folded, and can only be taken as a whole.
    width = sums.shape[1]
    step = width if cores.rows == nvidia.ROWS else CHUNK
    for at in range(0, width, step):
      n = min(step, width - at)
      ref = sums if n == width else sums.at[:, pl.ds(at, n)]
      part = plgpu.async_load_tmem(ref)
      plgpu.wait_load_tmem()
      scaled = part * wg.spread(factor, (cores.rows, n), 0, cores)
      plgpu.async_store_tmem(ref, scaled)
    plgpu.commit_tmem()

  def plus(self, name: str, total, a, b) -> None:
    """The sum and a @ b, with `a` in registers and `b` in shared memory."""
    if self.sizes.cores.rows == nvidia.ROWS:
      self.lhs[...] = a
      plgpu.commit_smem()
    else:
      plgpu.async_store_tmem(self.lhs, a)
      plgpu.commit_tmem()
    plgpu.tcgen05_mma(self.sums[name], self.lhs, b, self.done[1])
    plgpu.barrier_wait(self.done[1])

  def plus_both(self, names, totals, first, second):
    """Two of `plus`, one after the other."""
    pairs = zip(names, totals, (first, second), strict=True)
    return tuple(self.plus(name, x, *ab) for name, x, ab in pairs)

  def read(self, name: str, total) -> jax.Array:
    """The sum as an array."""
    del total
    sums = plgpu.async_load_tmem(self.sums[name])
    plgpu.wait_load_tmem()
    return sums


def _memory(cores: nvidia.Cores, width: int):
  """Tensor memory of f32 for each warpgroup, side by side."""
  shape = (cores.rows, cores.computing * width)
  if cores.rows == nvidia.ROWS:
    halves: Any = _Halves(width)
    return plgpu.TMEM(shape, jnp.float32, layout=halves)
  return plgpu.TMEM(shape, jnp.float32)


class _Halves(NamedTuple):
  """The layout of 64 rows: each half of the columns has 64 of the lanes.

  Given by hand, since the one that is inferred folds all warpgroups' columns
  at once, and then a warpgroup's part cannot be cut out.
  """

  columns: int

  def to_mgpu(self):
    return tcgen05.tmem_half_lane_layout(self.columns)
