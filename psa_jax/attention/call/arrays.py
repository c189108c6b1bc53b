"""Shapes and dtypes of a call's arrays: brought to one form, or refused."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Arrays(NamedTuple):
  """The arguments with a batch axis.

  Attributes:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, Hv].
    batched: whether the caller's had it.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  batched: bool

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Of the output."""
    B, T, N, _ = self.query.shape
    return B, T, N, self.value.shape[3]

  @property
  def same_length(self) -> bool:
    """Whether T is S, as in self-attention."""
    return self.query.shape[1] == self.key.shape[1]


def prepare(query: ArrayLike, key: ArrayLike, value: ArrayLike) -> Arrays:
  """The three arrays, as JAX arrays with four axes.

  Args:
    query: [B, T, N, H] or [T, N, H].
    key: [B, S, K, H] or [S, K, H].
    value: [B, S, K, Hv] or [S, K, Hv].

  Raises:
    ValueError: shapes or dtypes that do not fit, naming both.
  """
  arrays = {'query': query, 'key': key, 'value': value}
  arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
  shapes = ', '.join(f'{name} {x.shape}' for name, x in arrays.items())
  axes = {x.ndim for x in arrays.values()}
  if axes not in ({3}, {4}):
    raise ValueError(
      f'{shapes}: all three must be [batch, length, heads, width] or all '
      '[length, heads, width]'
    )
  dtypes = {name: x.dtype.name for name, x in arrays.items()}
  if len(set(dtypes.values())) > 1:
    raise ValueError(f'dtypes differ: {dtypes}; cast them to one')
  if not jnp.issubdtype(arrays['query'].dtype, jnp.floating):
    raise ValueError(f'query is {dtypes["query"]}; cast it to a float dtype')
  batched = axes == {4}
  q, k, v = (x if batched else x[None] for x in arrays.values())
  _check(q, k, v, shapes)
  return Arrays(q, k, v, batched)


def _check(q, k, v, shapes: str) -> None:
  if q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0]:
    raise ValueError(f'{shapes} differ in batch size; make it equal')
  if k.shape[1] != v.shape[1]:
    raise ValueError(
      f'{shapes}: a key needs a value; make the lengths of key and value equal'
    )
  if k.shape[2] != v.shape[2]:
    raise ValueError(
      f'{shapes}: key and value must have the same number of heads'
    )
  if q.shape[3] != k.shape[3]:
    raise ValueError(
      f'{shapes}: query and key must have the same head width; '
      f'project them to one, {q.shape[3]} or {k.shape[3]}'
    )
  if not q.shape[3]:
    raise ValueError(f'{shapes}: heads must be at least 1 wide')
  if not k.shape[2] or q.shape[2] % k.shape[2]:
    raise ValueError(
      f'{shapes}: the {q.shape[2]} query heads must be a multiple of the '
      f'{k.shape[2]} key heads'
    )
