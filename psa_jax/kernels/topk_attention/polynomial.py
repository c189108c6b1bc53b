"""The polynomial in front of the softmax, and its derivatives.

With c the score after the clamp, `e = a3 c^3 + a2 c^2 + a1 c + a0`, and the
weights are the softmax of e. Coefficients are in ascending order, (a0, a1, a2,
a3): (0, 1, 0, 0) is the plain softmax. a0 moves no weight, for it adds the
same to every key; its gradient is exactly 0 here, because the noise that
rounding would leave in its place is what Adam divides by its own size.
"""

import jax
import jax.numpy as jnp


def clamped(s: jax.Array, bound: float) -> jax.Array:
  """`s` within [-bound, bound]; a bound of 0 is none.

  The gradient passes where nothing was cut, at the bounds too.
  """
  return jnp.where(inside(s, bound), s, jnp.sign(s) * bound) if bound else s


def inside(s: jax.Array, bound: float) -> jax.Array:
  """Where the clamp cuts nothing."""
  return jnp.abs(s) <= bound if bound else jnp.ones_like(s, bool)


def value(c: jax.Array, coeffs: jax.Array) -> jax.Array:
  """The polynomial at clamped scores `c`; `coeffs` is [4], ascending."""
  a0, a1, a2, a3 = (coeffs[i].astype(c.dtype) for i in range(4))
  return ((a3 * c + a2) * c + a1) * c + jax.lax.stop_gradient(a0)


def slope(c: jax.Array, coeffs: jax.Array) -> jax.Array:
  """The derivative of `value` in `c`."""
  _, a1, a2, a3 = (coeffs[i].astype(c.dtype) for i in range(4))
  return (3 * a3 * c + 2 * a2) * c + a1


def coefficient_gradients(c: jax.Array, d_e: jax.Array) -> jax.Array:
  """[4], from `d_e`, the gradient of `value`."""
  first = d_e * c
  second = first * c
  return jnp.stack(
    [
      jnp.zeros((), c.dtype),
      first.sum(),
      second.sum(),
      (second * c).sum(),
    ]
  )
