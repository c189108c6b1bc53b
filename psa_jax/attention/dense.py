"""Dense attention (`dense`): reads every visible key."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.registry import MechanismSpec, register
from psa_jax.config import AttentionConfig, MechanismConfig
from psa_jax.kernels.dense import dense_attention
from psa_jax.types import AttnOut, Learned


@dataclass(frozen=True)
class DenseConfig(MechanismConfig):
  """Dense causal attention; nothing to set."""


def dense(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Softmax attention over all visible keys; see `attend`."""
  del learned  # no parameters
  segment_ids = context.segment_ids
  out, _ = dense_attention(
    q,
    k,
    v,
    causal=context.causal,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    implementation=config.implementation,
  )
  return AttnOut(out, {'density': jnp.float32(1)})


def dense_cross(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  lengths: Int[Array, 'B'],
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """All of the first `lengths` keys; see `registry.CrossFunction`."""
  del config, context, learned
  B, T = q.shape[:2]
  real = jnp.arange(k.shape[1])[None] < lengths[:, None]
  mesh = jax.sharding.get_abstract_mesh()
  # XLA splits its own program over devices, not a kernel.
  single = mesh.empty or mesh.size == 1
  out, _ = dense_attention(
    q,
    k,
    v,
    causal=False,
    q_segment_ids=jnp.ones((B, T), jnp.int32),
    kv_segment_ids=real.astype(jnp.int32),
    implementation='auto' if single else 'xla',
  )
  return AttnOut(out, {'cross_density': jnp.float32(1)})


SPEC = register(
  MechanismSpec(
    name='dense', function=dense, config=DenseConfig, cross=dense_cross
  )
)
