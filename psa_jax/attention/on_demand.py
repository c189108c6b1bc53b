"""Attention by the high bits of the keys, more on demand (`on_demand`).

SpAtten's progressive quantisation; see `psa_jax/quant/on_demand.py`. Every
visible key is read, so `density` is 1; what is saved are bits.
"""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.registry import MechanismSpec, register
from psa_jax.config import AttentionConfig
from psa_jax.quant.on_demand import OnDemandConfig, on_demand_attention
from psa_jax.types import AttnOut, Learned


def on_demand(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Attention by bits on demand; args as in `attend`.

  The aux scalars beside `density` are `refetch_rate` (share of query rows that
  read the low bits) and `key_bits` (bits read of a key channel).
  """
  del learned  # no parameters
  segment_ids = context.segment_ids
  out, stats = on_demand_attention(
    q,
    k,
    v,
    config=config.on_demand,
    causal=context.causal,
    q_segment_ids=segment_ids,
    kv_segment_ids=segment_ids,
    implementation=config.implementation,
  )
  aux = {
    'density': jnp.float32(1),
    'refetch_rate': stats.refetch_rate,
    'key_bits': stats.key_bits,
  }
  return AttnOut(checkpoint_name(out, 'attn_out'), aux)


SPEC = register(
  MechanismSpec(name='on_demand', function=on_demand, config=OnDemandConfig)
)
