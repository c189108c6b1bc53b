"""Choices of key blocks that do not look at the keys, to judge `psa` against.

Both spend the budget that `psa` would spend and share all of its code: they
hand the scorer made-up vectors in place of queries and pooled keys.

  recent  a block's score is its place: the nearest blocks, so what is read is
          the sink and one local window
  random  scores of random directions: any blocks, the same for a seed and a
          position whatever else is computed

Random lists are the same in every row, head and layer of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels.block_scores import Pooled
from psa_jax.types import Scalar

SCORINGS = ('random', 'recent')


def blind(
  q: Float[Array, 'B Tb N H'],
  pooled: Pooled,
  positions: Int[Array, 'B Tb'],
  *,
  scoring: str,
  seed: Scalar,
) -> tuple[Float[Array, 'B Tb N H'], Pooled]:
  """Queries and summaries that rank blocks without reading them.

  Args:
    q: only its shape counts.
    pooled: only its shape counts.
    positions: of the queries.
    scoring: one of `SCORINGS`.
    seed: traced; another one draws other random blocks.
  """
  B, K, blocks, H = pooled.total.shape
  make = _recent if scoring == 'recent' else functools.partial(_random, seed)
  queries, keys = make(positions, blocks, H)
  return (
    jnp.broadcast_to(queries[:, :, None], q.shape),
    Pooled(
      total=jnp.broadcast_to(keys[None, None], (B, K, blocks, H)),
      size=jnp.ones((B, blocks), jnp.int32),
      low=None,
      high=None,
    ),
  )


def _recent(positions, blocks, width):
  keys = jnp.zeros((blocks, width)).at[:, 0].set(jnp.arange(blocks))
  return jnp.zeros((*positions.shape, width)).at[..., 0].set(width**0.5), keys


def _random(seed, positions, blocks, width):
  # By position, not by row or head: those depend on how a mesh cuts them.
  key = jax.random.fold_in(jax.random.key(0), seed)
  of_query, of_block = jax.random.split(key)

  def normal(key, position):
    return jax.random.normal(jax.random.fold_in(key, position), (width,))

  keys = jax.vmap(functools.partial(normal, of_block))(jnp.arange(blocks))
  # Of one length, or a block with a long vector would be an outlier always.
  keys = keys * (width**0.5 / jnp.linalg.norm(keys, axis=-1, keepdims=True))
  draw = jax.vmap(jax.vmap(functools.partial(normal, of_query)))
  return draw(positions), keys
