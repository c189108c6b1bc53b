"""The cut of a row in plain XLA: two passes over the data in the usual case.

1. Maxima of `n / g` interleaved groups of `g` entries. The k-th largest of
   them is a lower bound of the k-th largest entry: k groups have an entry that
   large. With at least 4 k groups it is so near that on unordered data 1.2 k to
   1.3 k entries reach it.
2. These candidates are compacted, and bisection of the integer images finds
   the exact cut among them, early where a count hits k.

Where too many entries reach the bound (many equal ones, or an order that puts
the large ones into few groups), bisection over the whole row, at most 32
counts, raises it until they fit or it is the exact cut. So the result does
not depend on luck, only the time.

Loops end when every row is done, and run no step where there is nothing to do.
"""

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels.topk import image, words

MIN_GROUP = 4  # with smaller groups the maxima cost as much as they save
GROUPS_PER_K = 4


def cut(keys: jax.Array, k: jax.Array, *, spec) -> tuple[jax.Array, jax.Array]:
  """Image of the k-th largest entry, and where the last equal one is kept.

  Args:
    keys: [R, n] images of the entries.
    k: [R] in [1, n].
    spec: `api.Spec`.

  Returns:
    Two int32 [R]: entries with an image above the first survive, and those
    equal to it at positions up to the second.
  """
  n = keys.shape[1]
  group = group_size(n, spec.max_k)
  if group < MIN_GROUP:
    at = _kth_largest(keys, k, keys.min(1), keys.max(1))
  else:
    keys = jnp.pad(
      keys, ((0, 0), (0, -n % group)), constant_values=image.LOWEST
    )
    at = _by_candidates(keys, k, group, spec.max_k)
    keys = keys[:, :n]
  return at, _last_kept(keys, k, at)


def group_size(n: int, max_k: int) -> int:
  """The largest power of two that leaves enough groups."""
  most = n // (GROUPS_PER_K * max(max_k, 1))
  return 1 << max(most.bit_length() - 1, 0)


def _by_candidates(keys, k, group, max_k):
  """The k-th largest image of each row; the module's steps 1 and 2."""
  n = keys.shape[1]
  maxima = keys.reshape(len(k), group, -1).max(1)
  high = maxima.max(1)
  low, _ = _bisect(maxima, k, maxima.min(1), high, k + k // 8)
  # Half as many again as k, in whole words.
  room = words.BITS * (max_k * 3 // (2 * words.BITS) + 2)
  low, reached = _bisect(keys, k, low, high, jnp.full_like(k, room))
  where = words.compact(reached, room, n)
  few = jnp.take_along_axis(
    keys, where, 1, mode='fill', fill_value=image.LOWEST
  )
  # Where more than fit reach the bound, it is the k-th largest already. Any
  # `room` of them then have it as their k-th largest as well.
  return _kth_largest(few, k, low, high)


def _kth_largest(keys, k, low, high):
  low, _ = _bisect(keys, k, low, high, k)
  reached = keys >= low[:, None]
  return jnp.where(reached, keys, jnp.iinfo(jnp.int32).max).min(1)


def _bisect(keys, k, low, high, enough):
  """Raises a lower bound of the k-th largest image.

  Args:
    keys: [R, n].
    k: [R] in [1, n].
    low: [R], at most the k-th largest.
    high: [R], at least the k-th largest.
    enough: [R], at least k: stop when no more entries reach the bound.

  Returns:
    The bound, which is the k-th largest itself where more than `enough`
    entries reach it, and the entries that reach it, packed.
  """

  def reach(bound):
    return words.pack(keys >= bound[:, None])

  def unfinished(state):
    low, high, reached = state
    return ((words.total(reached) > enough) & (low < high)).any()

  def halve(state):
    low, high, reached = state
    middle = image.middle(low, high)
    trial = reach(middle)
    up = words.total(trial) >= k
    low = jnp.where(up, middle, low)
    high = jnp.where(up, high, middle - 1)
    return low, high, jnp.where(up[:, None], trial, reached)

  low, _, reached = lax.while_loop(unfinished, halve, (low, high, reach(low)))
  return low, reached


def _last_kept(keys, k, at):
  """Position of the last kept entry among those equal to the cut."""
  at = at[:, None]
  reached = words.pack(keys >= at)

  def count_equal(reached):
    equal = words.pack(keys == at)
    above = words.total(reached) - words.total(equal)
    return words.nth_position(equal, k - above - 1)

  def all_fit(reached):
    return jnp.full(len(reached), keys.shape[1], jnp.int32)

  surplus = (words.total(reached) > k).any()
  return lax.cond(surplus, count_equal, all_fit, reached)
