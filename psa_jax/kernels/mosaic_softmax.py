"""The online softmax in the fast memory of a TPU; see `softmax.py`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import mosaic, softmax

FINISH_ROWS = 256  # that are divided and written at a time


class Running(NamedTuple):
  """The online softmax of `softmax.Running` in VMEM, f32, to the base of 2.

  A column of one number a row costs a register for each 8 rows as a full row
  of lanes does, and has to be spread over the lanes at every use. So numbers a
  row are kept spread; the sums are kept by lane and added up once at the end.

  Attributes:
    out: [rows, width].
    top: [rows, 128], equal lanes.
    total: [rows, 128], whose sum is that of the probabilities.
  """

  out: Any
  top: Any
  total: Any

  @classmethod
  def scratch(cls, rows: int, width: int) -> 'Running':
    """What to allocate."""
    stat = pltpu.VMEM((rows, mosaic.LANES), jnp.float32)
    return cls(pltpu.VMEM((rows, width), jnp.float32), stat, stat)

  def start(self) -> None:
    """Nothing was read yet."""
    self.out[...] = jnp.zeros_like(self.out)
    self.top[...] = jnp.full_like(self.top, softmax.MASKED / 2)
    self.total[...] = jnp.zeros_like(self.total)

  def add(self, rows, scores, values) -> None:
    """Rows read values [keys, *] with scores * LOG2_E [rows, keys]."""
    keys = scores.shape[1]
    top = jnp.maximum(self.top[rows], scores.max(1, keepdims=True))
    p = jnp.exp2(scores - mosaic.spread(top, keys))
    old = jnp.exp2(self.top[rows] - top)
    read = mosaic.dot(p.astype(values.dtype), values, (1, 0))
    self.out[rows] = self.out[rows] * mosaic.spread(old, read.shape[1]) + read
    parts = [p[:, i : i + mosaic.LANES] for i in range(0, keys, mosaic.LANES)]
    self.total[rows] = self.total[rows] * old + sum(parts[1:], parts[0])
    self.top[rows] = top

  def finish(self, out, lse) -> None:
    """Writes the output [rows, width] and the log-sum-exp [1, lanes]."""
    count = out.shape[0]
    step = FINISH_ROWS if count % FINISH_ROWS == 0 else count

    def piece(n, carry):
      at = pl.multiple_of(n * step, step)
      rows, lanes = pl.ds(at, step), pl.ds(at, mosaic.lanes_of(step))
      total = self.total[rows].sum(1, keepdims=True)
      some = total > 0
      total = jnp.where(some, total, 1)
      out[rows] = (self.out[rows] / total).astype(out.dtype)
      log = self.top[rows] * (1 / mosaic.LOG2_E) + jnp.log(total)
      lse[:, lanes] = mosaic.row(jnp.where(some, log, -jnp.inf))
      return carry

    lax.fori_loop(0, count // step, piece, 0)
