"""What nobody reads is not seen, even where it is NaN or infinite.

A key that a query does not read has weight 0, and 0 x NaN is NaN: in `p @ v`,
and backward in `do @ v^T` and `ds @ k`. A select on every tile would cost the
kernels most where they are fastest. Instead values and keys are made fit for
products once, before and after the kernels:

* Forward (`mark`) values lose what is not finite, and the key of such a value
  becomes NaN. So it goes the way of a score, which every kernel masks by a
  select: who does not read the key gets nothing of it, who reads it gets NaN.
* Backward (`clean`) there are no NaNs in keys, values and queries at all. A row
  that read one has a log-sum-exp of NaN, and that says enough: its gradients
  are NaN, unless nothing depends on it (`softmax.Backward`).

So arrays with NaN or infinities where nobody reads give the same bits, forward
and backward, as arrays with zeros there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.custom_vjp
def mark(
  k: Float[Array, '*keys H'], v: Float[Array, '*keys Hv']
) -> tuple[Float[Array, '*keys H'], Float[Array, '*keys Hv']]:
  """Values that are finite, and keys that are NaN where one was not.

  Gradients pass as through a copy.
  """
  bad = ~(finite(k) & finite(v))[..., None]
  return jnp.where(bad, jnp.nan, k), clean(v)


# A rule of its own, for a select would keep its predicate until then.
mark.defvjp(lambda k, v: (mark(k, v), None), lambda _, grads: grads)


def finite(x: Float[Array, '*rows H']) -> Bool[Array, '*rows']:
  """Which rows hold finite numbers only."""
  return jnp.isfinite(x).all(-1)


def clean(x: Float[Array, '...']) -> Float[Array, '...']:
  """0 in place of every NaN and infinity."""
  return jnp.where(jnp.isfinite(x), x, 0)


def spoil(
  x: Float[Array, '*rows H'], bad: Bool[Array, '*rows']
) -> Float[Array, '*rows H']:
  """NaN in the rows that read what was not finite; gradients pass unchanged."""
  return x + jnp.where(bad, jnp.nan, 0).astype(x.dtype)[..., None]


def quiet(
  d_out: Float[Array, '*rows H'], d_lse: jax.Array
) -> Bool[Array, '*rows']:
  """Rows on which nothing depends: all their gradients are 0."""
  return (d_out == 0).all(-1) & (d_lse == 0)


def quiet_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, with no gradients of rows on which nothing depends.

  Args:
    function: from arrays [B, T, ...], or trees of them, to one [B, T, ...],
      where every row [b, t] depends on the same row of the arguments only.
  """

  def forward(*args):
    return function(*args), args

  def backward(args, grad):
    idle = (grad == 0).all(tuple(range(2, grad.ndim)))

    def hush(x):
      return jnp.where(idle.reshape(*idle.shape, *[1] * (x.ndim - 2)), 0, x)

    return jax.vjp(function, *jax.tree.map(hush, args))[1](grad)

  wrapped = jax.custom_vjp(function)
  wrapped.defvjp(forward, backward)
  return wrapped
