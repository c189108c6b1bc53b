"""Cross-attention: queries of one sequence read another one, the memory.

`dense` reads all of it, `topk` the best keys of every query, by the schedule
and the softmax of `attention.topk` (docs/mechanisms.md#topk): of a memory of n
tokens a query keeps max(1, floor(keep * n)). Queries and keys turn by their
places in their own sequences (rotary positions), so that near places find each
other first, as most translations have it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention import topk as topk_lib
from psa_jax.attention import topk_parameters
from psa_jax.attention.projections import bias_of, fan_in, head_dim, project
from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import AttentionConfig, ConfigError, ModelConfig
from psa_jax.kernels.dense import dense_attention
from psa_jax.kernels.topk_attention import topk_attention
from psa_jax.types import AttnOut, Learned, Scalar


class Memory(NamedTuple):
  """What is read: keys and values of one layer, and how many count."""

  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K H']
  lengths: Int[Array, 'B']


class CrossAttention(nnx.Module):
  """Attention from x [B, T, D] to a memory [B, S, D].

  Attributes:
    wq: [D, N, H]; wk, wv: [D, K, H]; wo: [N, H, D]; bq, bk, bv, bo: biases, as
      in `SelfAttention`.
    mechanism: the learned coefficients of `topk`, if it has any.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the projections."""
    self.config = config
    width, dtype = head_dim(config), jnp.dtype(config.param_dtype)
    query = (config.d_model, config.num_heads, width)
    key = (config.d_model, config.num_kv_heads, width)
    split = fan_in(0, (1, 2))
    merge = fan_in((0, 1), 2, scale=1 / (2 * config.num_layers))
    self.wq = nnx.Param(split(rngs.params(), query, dtype))
    self.wk = nnx.Param(split(rngs.params(), key, dtype))
    self.wv = nnx.Param(split(rngs.params(), key, dtype))
    self.wo = nnx.Param(merge(rngs.params(), (*query[1:], query[0]), dtype))
    self.bq = bias_of(config, *query[1:])
    self.bk = bias_of(config, *key[1:])
    self.bv = bias_of(config, *key[1:])
    self.bo = bias_of(config, config.d_model)
    own = config.attention.name == 'topk'
    self.mechanism = topk_parameters.make(config, rngs=rngs) if own else None

  def remember(
    self,
    memory: Float[Array, 'B S D'],
    lengths: Int[Array, 'B'],
    rope: Rotary | None = None,
  ) -> Memory:
    """Keys, turned by their places, and values; they serve every query."""
    k = rotate(project(memory, self.wk, self.bk), rope)
    return Memory(k, project(memory, self.wv, self.bv), lengths)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    memory: Memory,
    *,
    step: Scalar,
    rope: Rotary | None = None,
    train: bool,
    mechanism: str | None = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Reads the memory.

    Args:
      x: normalised residual stream.
      memory: from `remember`.
      step: optimiser step, which drives the schedules.
      rope: rotary table of the queries' places.
      train: whether `topk` follows its training schedule.
      mechanism: overrides `config.attention.name`.

    Returns:
      The output, and the f32 scalar `cross_density`: keys read as a share of
      those that count.
    """
    own = mechanism in (None, self.config.attention.name)
    learned = None
    if self.mechanism is not None and own:
      learned = self.mechanism(x, rope=None)
    out, aux = attend_cached(
      rotate(project(x, self.wq, self.bq), rope),
      memory,
      config=self.config.attention,
      step=step,
      train=train,
      learned=learned,
      mechanism=mechanism,
    )
    return project(out, self.wo, self.bo, inputs=2), aux


def attend_cached(
  q: Float[Array, 'B T N H'],
  memory: Memory,
  *,
  config: AttentionConfig,
  step: Scalar,
  train: bool,
  learned: Learned | None = None,
  mechanism: str | None = None,
) -> AttnOut:
  """Every query reads the first `memory.lengths` keys of its row.

  The function of arrays behind `CrossAttention`, and behind decoding, where the
  memory is the cache.

  Args and errors as in `base.attend`; one more error:

  Raises:
    ConfigError: a mechanism that does not read other sequences or caches here.
  """
  name = mechanism or config.name
  B, T = q.shape[:2]
  k, v, lengths = memory
  mesh = jax.sharding.get_abstract_mesh()
  # XLA splits its own program over devices, not a kernel.
  one = mesh.empty or mesh.size == 1
  implementation = config.implementation if one else 'xla'
  if name == 'dense':
    real = jnp.arange(k.shape[1])[None] < lengths[:, None]
    out, _ = dense_attention(
      q,
      k,
      v,
      causal=False,
      q_segment_ids=jnp.ones((B, T), jnp.int32),
      kv_segment_ids=real.astype(jnp.int32),
      implementation='auto' if one else 'xla',
    )
    return AttnOut(out, {'cross_density': jnp.float32(1)})
  if name != 'topk':
    raise ConfigError(
      f'attention {name} reads no other sequence and no cache in a model; take '
      'dense or topk'
    )
  cfg = config.topk
  end = jnp.broadcast_to(lengths.astype(jnp.int32)[:, None], (B, T))
  counts = topk_lib.kept_counts(end, topk_lib.keep_at(cfg, step, train))
  out = topk_attention(
    topk_lib.sparsify(q, keep=cfg.sparsify_q),
    topk_lib.sparsify(k, keep=cfg.sparsify_k),
    v,
    topk_lib.coefficients_at(cfg, step, learned),
    begin=jnp.zeros_like(end),
    end=end,
    counts=counts,
    causal=False,
    max_count=topk_lib.most_kept(cfg, k.shape[1]),
    clamp=cfg.clamp,
    implementation=implementation if name == config.name else 'auto',
  )
  share = counts.astype(jnp.float32) / jnp.maximum(end, 1)
  return AttnOut(out, {'cross_density': share.mean()})
