"""Cross-attention: queries of one sequence read another one, the memory.

Which mechanisms can do so, and how, is `cross` of their specs: `dense` reads
all of it, `topk` the best keys of every query. Queries and keys turn by their
places in their own sequences (rotary positions), so that near places find each
other first, as most translations have it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention import registry
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.projections import bias_of, fan_in, head_dim, project
from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import AttentionConfig, ConfigError, ModelConfig
from psa_jax.config.attention import names
from psa_jax.types import AttnOut, Learned


class KeyValues(NamedTuple):
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
    make = registry.get(config.attention.name).parameters
    self.mechanism = None if make is None else make(config, rngs=rngs)

  def project_kv(
    self,
    memory: Float[Array, 'B S D'],
    lengths: Int[Array, 'B'],
    rope: Rotary | None = None,
  ) -> KeyValues:
    """Keys, turned by their places, and values; they serve every query."""
    k = rotate(project(memory, self.wk, self.bk), rope)
    return KeyValues(k, project(memory, self.wv, self.bv), lengths)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    memory: KeyValues,
    *,
    context: AttentionContext,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Reads the memory.

    Args:
      x: normalised residual stream.
      memory: from `project_kv`.
      context: step, whether training, rotary table of the queries' places.

    Returns:
      The output, and the f32 scalar `cross_density`: keys read as a share of
      those that count.
    """
    learned = None if self.mechanism is None else self.mechanism(x, rope=None)
    out, aux = attend_cached(
      rotate(project(x, self.wq, self.bq), context.rope),
      memory,
      config=self.config.attention,
      context=context,
      learned=learned,
    )
    return project(out, self.wo, self.bo, inputs=2), aux


def attend_cached(
  q: Float[Array, 'B T N H'],
  memory: KeyValues,
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Every query reads the first `memory.lengths` keys of its row.

  The function of arrays behind `CrossAttention`, and behind decoding, where the
  memory is the cache.

  Args and errors as in `attend`; one more error:

  Raises:
    ConfigError: a mechanism that does not read other sequences or caches here.
  """
  spec = registry.get(config.name)
  if spec.cross is None:
    raise ConfigError(
      f'attention {config.name} reads no other sequence and no cache in a '
      f'model; take {" or ".join(names(reads_cross=True))}'
    )
  k, v, lengths = memory
  return spec.cross(
    q, k, v, lengths=lengths, config=config, context=context, learned=learned
  )
