"""The operations below the mechanisms, for arrays of any kind."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from psa_jax.attention import topk as topk_lib
from psa_jax.attention.softmax import SOFTMAX
from psa_jax.attention.topk import SparseWeights
from psa_jax.kernels import topk as engine
from psa_jax.kernels.topk import TopK


def top_k(
  x: ArrayLike,
  k: ArrayLike,
  *,
  max_k: int | None = None,
  implementation: str = 'auto',
) -> TopK:
  """The k largest entries of the last axis; see `psa_jax.kernels.topk`."""
  k = k if isinstance(k, int) else jnp.asarray(k)
  return engine.top_k(
    jnp.asarray(x), k, max_k=max_k, implementation=implementation
  )


def sparse_poly_softmax(
  x: ArrayLike,
  top_k: ArrayLike,
  coeffs: ArrayLike | tuple[float, ...] = SOFTMAX,
  *,
  clamp: float = 0.0,
  max_k: int | None = None,
  implementation: str = 'auto',
) -> SparseWeights:
  """Softmax of a cubic over the k largest; see `psa_jax.attention.topk`."""
  top_k = top_k if isinstance(top_k, int) else jnp.asarray(top_k)
  return topk_lib.sparse_poly_softmax(
    jnp.asarray(x),
    top_k,
    jnp.asarray(coeffs, jnp.float32),
    clamp=clamp,
    max_k=max_k,
    implementation=implementation,
  )
