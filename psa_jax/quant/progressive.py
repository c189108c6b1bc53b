"""Progressive quantisation in training: fewer bits as the step grows.

Full precision before `warmup_steps`, then `levels[0]` bits, and one level fewer
every `quantization_interval` steps down to the last one
(docs/mechanisms.md#quantisation). What is quantised is rounded to a symmetric
grid of 2^bits - 1 points,

  x' = s round(x / s),   s = max|x| / (2^(bits - 1) - 1),

the maximum over the elements that share a scale, and the gradient passes
straight through: nothing is clipped, since the maximum itself lies on the
grid. The bits are a traced scalar, so a run compiles once.

Which elements share a scale is decided by what must not happen:

* q, k, v: one token, or one head of one token. A scale of a whole sequence (or
  of one channel along it) would let a token see how large later ones are, and
  could not be repeated in decoding.
* Inputs of linear layers: one token. Weights: one output channel. Then both
  scales leave the sum, as an integer product needs.

Rounding is simulated in f32 whatever the compute dtype. Not done: integer
products, quantised gradients, learned scales, a clipping range.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax import schedules
from psa_jax.config import QuantConfig, ScheduleConfig
from psa_jax.types import Scalar

# Stands for full precision in the schedule; above every level.
FULL = 32


def bits_at(
  config: QuantConfig, step: Scalar, *, train: bool = True
) -> Int[Array, '']:
  """Bits in use at `step`; `FULL` means that nothing is rounded.

  Args:
    config: levels and steps.
    step: optimiser step; the first one with `levels[0]` is `warmup_steps`.
    train: outside training `eval_bits` counts, if it is set.
  """
  if not train and config.eval_bits:
    return jnp.int32(config.eval_bits)
  count, values = len(config.levels), (FULL, *config.levels)
  starts = [
    config.warmup_steps + i * config.quantization_interval for i in range(count)
  ]
  if config.warmup_steps == 0:
    starts, values = starts[1:], values[1:]
  schedule = ScheduleConfig(
    'piecewise',
    boundaries=tuple(starts),
    values=tuple(float(value) for value in values),
  )
  return schedules.make(schedule)(step).astype(jnp.int32)


def fake_quantize(
  x: Float[Array, '*S'],
  bits: Scalar,
  *,
  axes: tuple[int, ...] | None = None,
) -> Float[Array, '*S']:
  """Rounds `x` to a symmetric grid; the gradient passes straight through.

  Args:
    x: values; a group of zeros stays zero.
    bits: 2 to 16, or `FULL` for `x` itself, bit for bit; may be traced.
    axes: axes along which elements share a scale; None shares one in all.

  Returns:
    Multiples of the group's scale, in the dtype of `x`.
  """
  if axes is None:
    axes = tuple(range(x.ndim))
  bits = jnp.asarray(bits, jnp.int32)
  axes = tuple(axis % x.ndim for axis in axes)
  return _straight_through(x, bits, axes)


def _rounded(x, bits, axes):
  # A branch and not a choice between both: full precision costs nothing, and
  # nothing of the rounding is fused into what computed x.
  return jax.lax.cond(bits < FULL, lambda: _round(x, bits, axes), lambda: x)


def _round(x, bits, axes):
  wide = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
  most = (jnp.left_shift(1, bits - 1) - 1).astype(jnp.float32)
  scale = jnp.where(top > 0, top / most, 1)
  return (jnp.round(wide / scale) * scale).astype(x.dtype)


_straight_through = jax.custom_jvp(_rounded, nondiff_argnums=(2,))


@_straight_through.defjvp
def _straight_through_jvp(axes, primals, tangents):
  x, bits = primals
  return _straight_through(x, bits, axes), tangents[0]


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """What a layer quantises at one step; the default does nothing.

  Attributes:
    config: what is quantised, and which elements share a scale.
    bits: traced bits; None if quantisation is off.
  """

  config: QuantConfig = QuantConfig()
  bits: jax.Array | None = None

  @classmethod
  def at(cls, config: QuantConfig, step: Scalar, *, train: bool) -> 'Quantizer':
    """The quantiser of one step."""
    if not config.enabled:
      return cls()
    return cls(config, bits_at(config, step, train=train))

  def heads(self, x: Float[Array, 'B T N H']) -> Float[Array, 'B T N H']:
    """Queries, keys or values."""
    if self.bits is None:
      return x
    axes = (3,) if self.config.granularity == 'head' else (2, 3)
    return fake_quantize(x, self.bits, axes=axes)

  def inputs(self, x: jax.Array, *, count: int = 1) -> jax.Array:
    """What a linear layer reads; its last `count` axes are contracted."""
    if self.bits is None or not self.config.activations:
      return x
    return fake_quantize(x, self.bits, axes=tuple(range(-count, 0)))

  def kernel(self, kernel: jax.Array, *, count: int = 1) -> jax.Array:
    """A linear layer's weights; their first `count` axes are contracted."""
    if self.bits is None or not self.config.weights:
      return kernel
    return fake_quantize(kernel, self.bits, axes=tuple(range(count)))

  def aux(self, dtype) -> dict[str, jax.Array]:
    """The scalar `bits` that was used; full precision is that of `dtype`."""
    if self.bits is None:
      return {}
    full = 8 * jnp.dtype(dtype).itemsize
    return {
      'bits': jnp.where(self.bits < FULL, self.bits, full).astype(jnp.float32)
    }


OFF = Quantizer()
