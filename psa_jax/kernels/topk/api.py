"""The k largest entries of the last axis, without sorting.

SpAtten's top-k engine (arXiv 2012.09852, section IV.B): a quick-select finds
the k-th largest value, a filter keeps what is larger and as many equal
entries as there is room for, and a prefix sum compacts the survivors in the
order they came in. Work is O(n) a row for any k. The paper's printed
algorithm is off by one: the zero-based target of its quick-select is k - 1.

All functions share one contract:

* Every leading axis is a batch of rows; call them on the whole array rather
  than under `vmap`. `k` may differ by row and may be traced: a new value does
  not compile again.
* Exactly min(k, n) entries of a row survive, where n is its length.
* Equal entries are taken by position, lowest index first: the set is that of
  a stable descending sort, on every platform. 0.0 and -0.0 are equal.
* NaN of either sign is larger than +inf, and equal to every other NaN. This
  is where `jax.lax.top_k` puts a positive NaN.
* Survivors keep their order; `jax.lax.top_k` instead sorts them by value.

Implementations differ in how they find the cut of a row: the k-th largest
value and the position of the last equal entry that is kept. The rest is
shared; see `words.py`.

Not done here: sorting the survivors, the smallest k (negate), other dtypes
than `image.DTYPES`, and a kernel for GPUs: they take `xla`.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Num

from psa_jax.kernels import platform
from psa_jax.kernels.platform import Implementation
from psa_jax.kernels.topk import image, pallas_tpu, reference, words, xla

IMPLEMENTATIONS = {
  'pallas_tpu': Implementation(
    pallas_tpu.cut, pallas_tpu.refusal, platform='tpu'
  ),
  'xla': Implementation(xla.cut),
  'reference': Implementation(reference.cut, automatic=False),
}


class TopK(NamedTuple):
  """The survivors of every row, in the order of their positions.

  Attributes:
    values: [..., M] in the dtype of `x`; 0 past the count.
    indices: [..., M] int32, ascending; n, one past the last entry, past the
      count.
    count: [...] int32, min(k, n).
  """

  values: Num[Array, '*rows M']
  indices: Int[Array, '*rows M']
  count: Int[Array, '*rows']


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call.

  Attributes:
    max_k: no row keeps more.
  """

  max_k: int


def top_k(
  x: Num[Array, '*rows n'],
  k: Int[Array, '*#rows'] | int,
  *,
  max_k: int | None = None,
  implementation: str = 'auto',
) -> TopK:
  """Values and positions of the k largest entries of each row.

  Differentiable in `x` through the values; which entries survive is constant.

  Args:
    x: float32, bfloat16, float16 or int32.
    k: how many to keep, an int or an array that broadcasts to the rows. An
      array may be traced; its entries are clipped to [0, min(max_k, n)].
    max_k: M, the width of the result. None means `k`, which must be an int
      then.
    implementation: a key of `IMPLEMENTATIONS`, or `auto` for the platform's
      best.

  Raises:
    ValueError: an array `k` without `max_k`, a negative int, another dtype,
      rows without entries, or an implementation that cannot run here.
  """
  if max_k is None:
    if not isinstance(k, int | np.integer):
      raise ValueError('k is an array: give max_k, the width of the result')
    max_k = int(k)
  rows, n = x.shape[:-1], x.shape[-1]
  x2, k1, spec = _prepare(x, k, max_k)
  kept = words.pack(_kept(*_cut(x2, k1, spec, implementation)))
  indices = words.compact(kept, max_k, n)
  values = jnp.take_along_axis(x2, indices, -1, mode='fill', fill_value=0)
  return TopK(
    values.reshape(*rows, max_k),
    indices.reshape(*rows, max_k),
    k1.reshape(rows),
  )


def select(
  x: Num[Array, '*rows n'],
  k: Int[Array, '*#rows'] | int,
  *,
  max_k: int | None = None,
  implementation: str = 'auto',
) -> Bool[Array, '*rows n']:
  """True at the k largest entries of each row.

  Args:
    x: see `top_k`.
    k: see `top_k`.
    max_k: a bound on an array `k`, which makes the search faster where it is
      far below n; a larger `k` is clipped to it. None means n.
    implementation: see `top_k`.

  Raises:
    ValueError: see `top_k`.
  """
  x2, k1, spec = _prepare(x, k, max_k)
  return _kept(*_cut(x2, k1, spec, implementation)).reshape(x.shape)


def threshold(
  x: Num[Array, '*rows n'],
  k: Int[Array, '*#rows'] | int,
  *,
  max_k: int | None = None,
  implementation: str = 'auto',
) -> Num[Array, '*rows']:
  """The k-th largest value of each row, the smallest for k > n.

  No gradient flows through it. +inf for k = 0 (of int32, the largest
  number), 0.0 for -0.0.

  Args:
    x: see `top_k`.
    k: see `top_k`.
    max_k: see `select`.
    implementation: see `top_k`.

  Raises:
    ValueError: see `top_k`.
  """
  x2, k1, spec = _prepare(x, k, max_k)
  _, at, _ = _cut(x2, k1, spec, implementation)
  value = jnp.where(k1 > 0, image.restore(at, x.dtype), image.infinity(x.dtype))
  return value.reshape(x.shape[:-1])


def _prepare(x, k, max_k):
  """Rows [R, n], one k a row [R] in [0, min(max_k, n)], and the spec."""
  n = x.shape[-1]
  if x.dtype.name not in image.DTYPES:
    raise ValueError(
      f'x is {x.dtype.name}; cast it to one of {list(image.DTYPES)}'
    )
  if n == 0:
    raise ValueError(f'x {x.shape} has no entries to choose from')
  if isinstance(k, int | np.integer):
    if k < 0:
      raise ValueError(f'k={k} must be >= 0')
    max_k = min(int(k), n if max_k is None else max_k)
  max_k = n if max_k is None else max_k
  if max_k < 0:
    raise ValueError(f'max_k={max_k} must be >= 0')
  spec = Spec(max_k=min(max_k, n))
  k = jnp.clip(jnp.asarray(k, jnp.int32), 0, spec.max_k)
  k = jnp.broadcast_to(k, x.shape[:-1]).reshape(-1)
  return x.reshape(-1, n), k, spec


def _cut(x, k, spec, implementation):
  """Images of `x` [R, n], and the cut of each row: two [R].

  An entry survives if its image is above the first, or equal to it at a
  position up to the second.
  """
  keys = image.ordered(lax.stop_gradient(x))
  run = platform.pick(implementation, IMPLEMENTATIONS, keys, k, spec=spec)
  # Every k is at least 1 there; with 0, nothing is above the first's cut.
  at, last = run(keys, jnp.maximum(k, 1), spec=spec)
  return keys, at, jnp.where(k > 0, last, -1)


def _kept(keys, at, last):
  """[R, n] bool."""
  at, last = at[:, None], last[:, None]
  position = jnp.arange(keys.shape[1])[None]
  return (keys > at) | ((keys == at) & (position <= last))
