"""The softmax that the tiled kernels share, exact or approximate.

A tile of queries meets its keys in pieces. `start`, `add` and `finish` keep
the running maximum, sum and output of FlashAttention (Dao et al. 2022, Alg.
1); `Backward` recomputes the probabilities from the log-sum-exp.

Two approximations (`Kind`), each with its derivative:

  polynomial  softmax of a cubic of the clamped score
              (docs/mechanisms.md#softmax); with the coefficients
              (0, 1, 0, 0) and no clamp it is exact
  sas         TurboAttention (arXiv 2412.08585, section 4): with x = score -
              row maximum, e^x is 0 below -6 and else a table entry for the
              whole part times a cubic for the fraction

SAS depends on the row maximum itself and not only on differences, so the
maximum has to be known before anything is summed: one more pass over the
scores, which the online form does without. Its derivative takes the maximum as
a constant, which for the exact exponential makes no difference; here what is
left out is bounded by how far the cubic's derivative is from itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psa_jax.kernels import unread

# Masked scores. Half of it is the initial row maximum, so that a row that has
# read nothing yet has exp(MASKED - MASKED / 2) = 0 and not exp(0).
MASKED = -1e30


# SAS: least-squares cubic of e^-t on [0, 1], largest error 3.9e-4, highest
# power first; and where it stops.
SAS_CUBIC = (-0.10250, 0.46247, -0.99205, 0.99961)
SAS_LEAST = -6.0
KINDS = ('exact', 'polynomial', 'sas')
Cubic = Float[Array, '4'] | Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Kind:
  """Which softmax; static.

  Attributes:
    name: one of `KINDS`.
    clamp: a polynomial's scores are clamped to [-clamp, clamp].
  """

  name: str = 'exact'
  clamp: float = 10.0

  def __post_init__(self):
    """Checks the values.

    Raises:
      ValueError: an unknown name, or a clamp that is not positive.
    """
    if self.name not in KINDS:
      raise ValueError(
        f'unknown softmax {self.name!r}; choose from {list(KINDS)}'
      )
    if not self.clamp > 0:
      raise ValueError(f'softmax clamp={self.clamp} must be above 0')

  @property
  def needs_top(self) -> bool:
    """Whether the row maximum must be known before the first sum."""
    return self.name == 'sas'

  def scores(self, s: jax.Array, coefficients: Cubic | None) -> jax.Array:
    """What the exponential is taken of."""
    if coefficients is None:
      return s
    return polynomial(s, coefficients, clamp=self.clamp)

  def weights(self, x: jax.Array) -> jax.Array:
    """e^x, or its approximation, for x <= 0."""
    return sas(x) if self.name == 'sas' else jnp.exp(x)

  def slopes(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Derivative of `weights` by x."""
    return sas_slope(x) if self.name == 'sas' else weights


EXACT = Kind()


def polynomial(
  s: Float[Array, '...'], coefficients: Cubic, *, clamp: float
) -> Float[Array, '...']:
  """a3 s^3 + a2 s^2 + a1 s + a0 of the score clamped to [-clamp, clamp].

  Args:
    s: raw scores.
    coefficients: (a0, a1, a2, a3), an array or its four scalars.
    clamp: largest magnitude that counts.
  """
  a0, a1, a2, a3 = (coefficients[i].astype(s.dtype) for i in range(4))
  s = jnp.clip(s, -clamp, clamp)
  return ((a3 * s + a2) * s + a1) * s + a0


def polynomial_slope(s, coefficients, *, clamp):
  """Derivative of `polynomial` by s; 0 where it is clamped."""
  _, a1, a2, a3 = (coefficients[i].astype(s.dtype) for i in range(4))
  inside = (s >= -clamp) & (s <= clamp)
  return jnp.where(inside, (3 * a3 * s + 2 * a2) * s + a1, 0)


def through_polynomial(ds, raw, coefficients, kind: Kind, sum_of=jnp.sum):
  """From gradients of a polynomial's values to those of what it was made of.

  Args:
    ds: of the values; 0 where a score is masked.
    raw: the scores.
    coefficients: (a0, a1, a2, a3).
    kind: the softmax.
    sum_of: of what every score gives to a coefficient's gradient.

  Returns:
    Gradients of the scores and of the coefficients, four.
  """
  s = jnp.clip(raw, -kind.clamp, kind.clamp)
  powers = [ds, ds * s, ds * s**2, ds * s**3]
  of_coefficients = jnp.stack([sum_of(x) for x in powers])
  slope = polynomial_slope(raw, coefficients, clamp=kind.clamp)
  return ds * slope, of_coefficients


def sas(x: Float[Array, '...']) -> Float[Array, '...']:
  """SAS's e^x for x <= 0: table of whole parts times cubic, 0 below -6."""
  table, fraction, some = _sas_parts(x)
  a3, a2, a1, a0 = SAS_CUBIC
  value = ((a3 * fraction + a2) * fraction + a1) * fraction + a0
  return jnp.where(some, table * value, 0)


def sas_slope(x: Float[Array, '...']) -> Float[Array, '...']:
  """Derivative of `sas` by x between its jumps."""
  table, fraction, some = _sas_parts(x)
  a3, a2, a1, _ = SAS_CUBIC
  slope = (3 * a3 * fraction + 2 * a2) * fraction + a1
  return jnp.where(some, -table * slope, 0)


def _sas_parts(x):
  """Table entry, fraction in [0, 1), and whether x is above the cut-off."""
  # Rounding may put a recomputed score above the row's maximum.
  t = jnp.minimum(jnp.where(x > 0, 0, -x), -SAS_LEAST + 1)
  whole = jnp.floor(t)
  # The table's entry for 0 to 7, by the bits of its index: no gather, which
  # vector units do not have.
  index = whole.astype(jnp.int32)
  table = jnp.ones_like(t)
  for bit in (1, 2, 4):
    table = table * jnp.where(index & bit, math.exp(-bit), 1.0).astype(t.dtype)
  return table, t - whole, ~(x < SAS_LEAST)  # NaN is not cut off


class Running(NamedTuple):
  """What a tile has read so far; all in the accumulation dtype.

  Attributes:
    out: [rows, Hv] weighted sum of the values.
    top: [rows] largest score.
    total: [rows] sum of exp(score - top).
  """

  out: jax.Array
  top: jax.Array
  total: jax.Array


def dot(equation: str, a: jax.Array, b: jax.Array, acc) -> jax.Array:
  """An einsum of two operands with sums in `acc`."""
  return jnp.einsum(equation, a, b, preferred_element_type=acc)


def prescale(q: jax.Array, scale: float, acc) -> tuple[jax.Array, float]:
  """Queries that carry the scale, and the factor that scores still need.

  One product a query instead of one a score; low-precision queries keep theirs
  for the scores, where it costs no rounding.
  """
  return (q * scale, 1.0) if q.dtype == acc else (q, scale)


def start(rows: int, width: int, acc) -> Running:
  """Nothing was read yet."""
  return Running(
    jnp.zeros((rows, width), acc),
    jnp.full((rows,), MASKED / 2, acc),
    jnp.zeros((rows,), acc),
  )


def add_below(
  run: Running, scores: jax.Array, values: jax.Array, kind: Kind
) -> Running:
  """Like `add` where `run.top` is the row's final maximum already."""
  p = kind.weights(scores - run.top[:, None])
  read = dot('rs,sh->rh', p.astype(values.dtype), values, scores.dtype)
  return Running(run.out + read, run.top, run.total + p.sum(-1))


def add(run: Running, scores: jax.Array, values: jax.Array) -> Running:
  """Reads values [keys, Hv] with scores [rows, keys], but not MASKED ones."""
  top = jnp.maximum(run.top, scores.max(-1))
  p = jnp.exp(scores - top[:, None])
  old = jnp.exp(run.top - top)
  read = dot('rs,sh->rh', p.astype(values.dtype), values, scores.dtype)
  return Running(
    run.out * old[:, None] + read, top, run.total * old + p.sum(-1)
  )


def finish(run: Running, dtype) -> tuple[jax.Array, jax.Array]:
  """Output in `dtype` and log-sum-exp; 0 and -inf where nothing was read."""
  none = run.total == 0  # what `> 0` would take NaN for
  total = jnp.where(none, 1, run.total)
  lse = jnp.where(none, -jnp.inf, run.top + jnp.log(total))
  return (run.out / total[:, None]).astype(dtype), lse


class Backward(NamedTuple):
  """What the backward pass knows of every row.

  Attributes:
    lse: log-sum-exp; +inf where nothing was read, or nothing depends on the
      row, so that its exp is 0.
    delta: what every score's gradient has in common.
    top: row maximum, where the softmax depends on it, else None.
  """

  lse: jax.Array
  delta: jax.Array
  top: jax.Array | None = None

  @classmethod
  def of(cls, out, lse, d_out, d_lse, top=None) -> 'Backward':
    """From the forward pass's results [B, T, N, ...] and their gradients."""
    dtype = lse.dtype
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse
    # Of a row that is NaN all this would be NaN, though nothing comes of it.
    idle = unread.quiet(d_out, d_lse)
    if top is not None:
      top = jnp.where(idle, 0, top)
    lse = jnp.where(idle | (lse == -jnp.inf), jnp.inf, lse)
    return cls(lse, jnp.where(idle, 0, delta), top)

  def probabilities(self, s: jax.Array, kind: Kind):
    """Of a tile [keys, rows], and their derivatives by the scores.

    The attributes are those of the tile's rows, [rows].
    """
    if self.top is None:
      p = jnp.exp(s - self.lse[None])
      return p, p
    x, share = s - self.top[None], jnp.exp(self.top - self.lse)[None]
    p = kind.weights(x)
    return p * share, kind.slopes(x, p) * share


def merge(
  outs: Sequence[Float[Array, 'B T N Hv']],
  lses: Sequence[Float[Array, 'B T N']],
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Attention over the union of disjoint sets of keys, from its parts.

  Exact for parts with the exact or a polynomial softmax, and differentiable
  in both arguments: the log-sum-exp of a part is all that its share of the
  whole softmax depends on. (With SAS parts keep the cut-off of their own row
  maximum.)

  Args:
    outs: outputs over each set.
    lses: their log-sum-exps; -inf where a query reads nothing of a set.

  Returns:
    Output in the dtype of the parts, and log-sum-exp; 0 and -inf where a query
    reads nothing at all.
  """
  lse = jnp.stack(list(lses))
  top = jax.lax.stop_gradient(lse.max(0))
  top = jnp.where(jnp.isfinite(top), top, 0)
  # exp(-inf) has a gradient of 0 * inf in some rules: leave those parts out.
  some = lse != -jnp.inf
  weight = jnp.where(some, jnp.exp(jnp.where(some, lse, 0) - top[None]), 0)
  total = weight.sum(0)
  read = total != 0
  total = jnp.where(read, total, 1)
  out = sum(
    w[..., None] * part.astype(lse.dtype)
    for w, part in zip(weight / total[None], outs, strict=True)
  )
  merged = jnp.where(read, jnp.log(total) + top, -jnp.inf)
  return jnp.asarray(out).astype(outs[0].dtype), merged
