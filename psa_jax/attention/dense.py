"""Dense attention (`dense`): reads every visible key."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.config import AttentionConfig
from psa_jax.kernels.dense import dense_attention
from psa_jax.types import AttnOut, Learned, Scalar


def dense(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  step: Scalar = 0,
  segment_ids: Int[Array, 'B T'] | None = None,
  train: bool = True,
  causal: bool = True,
  learned: Learned | None = None,
) -> AttnOut:
  """Softmax attention over all visible keys; see `base.attend`."""
  del step, train, learned  # no schedule, no parameters
  out, _ = dense_attention(
    q,
    k,
    v,
    causal=causal,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    implementation=config.implementation,
  )
  return AttnOut(out, {'density': jnp.float32(1)})
