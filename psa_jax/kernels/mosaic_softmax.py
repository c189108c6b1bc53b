"""The softmax in the fast memory of a TPU; see `softmax.py`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import mosaic, softmax

FINISH_ROWS = 256  # that are divided and written at a time


class Scores(NamedTuple):
  """What becomes of products of queries and keys.

  Exponentials are to the base of 2, so that the factor of it is one with the
  scale. SAS cuts numbers into whole and fraction, so its scores keep their
  unit.

  Attributes:
    kind: which softmax; static.
    scale: factor on the products; static.
    cubic: a polynomial's four coefficients, or None.
  """

  kind: softmax.Kind
  scale: float
  cubic: Any = None

  @classmethod
  def of(cls, spec, coefficients) -> 'Scores':
    """From a call's static part and the coefficients [4] in SMEM, or None."""
    cubic = None
    if coefficients is not None:
      cubic = [coefficients[i] for i in range(4)]
    return cls(spec.softmax, spec.scale, cubic)

  @property
  def unit(self) -> float:
    """What scores as the softmax takes them are in multiples of."""
    return 1.0 if self.kind.needs_top else mosaic.LOG2_E

  def raw(self, products):
    """Scores, of the exact softmax with their factor."""
    early = self.kind.name == 'exact'
    return products * (self.scale * (self.unit if early else 1.0))

  def taken(self, raw):
    """What the exponential is taken of, times `unit`."""
    if self.cubic is None:
      return raw
    return self.kind.scores(raw, self.cubic) * self.unit

  def probabilities(self, raw, lse, top, mask):
    """Of scores, and their derivatives by what the exponential is taken of.

    Args:
      raw: see `raw`.
      lse: that of their rows, to the base of 2.
      top: the row maxima of SAS, else None.
      mask: True where something is read; None for everywhere.
    """
    if top is None:
      p = jnp.exp2(self.taken(raw) - lse)
      p = p if mask is None else jnp.where(mask, p, 0)
      return p, p
    x, share = raw - top, jnp.exp2(top * mosaic.LOG2_E - lse)
    p = self.kind.weights(x)
    both = p * share, self.kind.slopes(x, p) * share
    if mask is None:
      return both
    return tuple(jnp.where(mask, y, 0) for y in both)

  def through(self, ds, raw):
    """Gradients of the scores from those of `taken`, without its unit.

    Returns:
      And those of the coefficients as [4, 128], by lane; None if there are
      none.
    """
    if self.cubic is None:
      return ds, None
    return softmax.through_polynomial(
      ds, raw, self.cubic, self.kind, lambda x: fold(x.sum(0, keepdims=True))[0]
    )


def fold(x):
  """Sums over registers that lie side by side: [rows, keys] -> [rows, 128]."""
  lanes = mosaic.LANES
  parts = [x[:, i : i + lanes] for i in range(0, x.shape[1], lanes)]
  return sum(parts[1:], parts[0])


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

  def raise_top(self, rows, scores) -> None:
    """Of the first of two passes: the maxima of scores [rows, keys]."""
    top = scores.max(1, keepdims=True)
    self.top[rows] = jnp.maximum(self.top[rows], top)

  def add_below(self, rows, scores, values, kind: softmax.Kind) -> None:
    """Like `add` where the maxima are final already; scores as they are."""
    p = kind.weights(scores - mosaic.spread(self.top[rows], scores.shape[1]))
    self.out[rows] += mosaic.dot(p.astype(values.dtype), values, (1, 0))
    self.total[rows] += fold(p)

  def add(self, rows, scores, values) -> None:
    """Rows read values [keys, *] with scores * LOG2_E [rows, keys]."""
    keys = scores.shape[1]
    top = jnp.maximum(self.top[rows], scores.max(1, keepdims=True))
    p = jnp.exp2(scores - mosaic.spread(top, keys))
    old = jnp.exp2(self.top[rows] - top)
    read = mosaic.dot(p.astype(values.dtype), values, (1, 0))
    self.out[rows] = self.out[rows] * mosaic.spread(old, read.shape[1]) + read
    self.total[rows] = self.total[rows] * old + fold(p)
    self.top[rows] = top

  def finish(self, out, lse, top=None, *, unit=mosaic.LOG2_E) -> None:
    """Writes what was found.

    Args:
      out: output, [rows, width].
      lse: log-sum-exp, [1, lanes].
      top: maxima, likewise; None if nobody asks.
      unit: of the scores.
    """
    count = out.shape[0]
    step = FINISH_ROWS if count % FINISH_ROWS == 0 else count

    def piece(n, carry):
      at = pl.multiple_of(n * step, step)
      rows, lanes = pl.ds(at, step), pl.ds(at, mosaic.lanes_of(step))
      total = self.total[rows].sum(1, keepdims=True)
      # Not `> 0` or `!= 0`, which are false of NaN on a TPU.
      none = total == 0
      total = jnp.where(none, 1, total)
      out[rows] = (self.out[rows] / total).astype(out.dtype)
      log = self.top[rows] * (1 / unit) + jnp.log(total)
      lse[:, lanes] = mosaic.row(jnp.where(none, -jnp.inf, log))
      if top is not None:
        top[:, lanes] = mosaic.row(self.top[rows] * (1 / unit))
      return carry

    lax.fori_loop(0, count // step, piece, 0)
