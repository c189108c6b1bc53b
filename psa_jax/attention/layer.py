"""Self-attention layer: projections, rotary positions, one mechanism call.

The mechanism is looked up by name behind `attention.base.attend`, so the
layer knows nothing of block lists or budgets. Queries come in groups of
G = N // K heads that share a key and value head (GQA, arXiv 2305.13245);
keys and values are never repeated in memory.

Not done: cross-attention, and the cache of decoding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax.attention import base
from psa_jax.attention.projections import fan_in, head_dim, project
from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import ModelConfig
from psa_jax.types import Scalar


class SelfAttention(nnx.Module):
  """Causal self-attention over one sequence; `config.attention` picks how.

  Attributes:
    wq: [D, N, H]; wk, wv: [D, K, H]; wo: [N, H, D]. No biases. `wo` writes
      to the residual stream, so it starts smaller by 1 / sqrt(2 L).
    mechanism: the parameters of the configured mechanism, if it has any.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the projections.

    Raises:
      ConfigError: head counts that do not fit (see `head_dim`).
    """
    self.config = config
    width, dtype = head_dim(config), jnp.dtype(config.param_dtype)
    query = (config.d_model, config.num_heads, width)
    key = (config.d_model, config.num_kv_heads, width)
    project = fan_in(0, (1, 2))
    merge = fan_in((0, 1), 2, scale=1 / (2 * config.num_layers))
    self.wq = nnx.Param(project(rngs.params(), query, dtype))
    self.wk = nnx.Param(project(rngs.params(), key, dtype))
    self.wv = nnx.Param(project(rngs.params(), key, dtype))
    self.wo = nnx.Param(merge(rngs.params(), (*query[1:], query[0]), dtype))
    make = base.PARAMETERS.get(config.attention.name)
    self.mechanism = None if make is None else make(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    step: Scalar,
    rope: Rotary,
    segment_ids: Int[Array, 'B T'] | None = None,
    train: bool,
    mechanism: str | None = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Attends from every position to itself and what is before it.

    Args:
      x: normalised residual stream, already in the compute dtype.
      step: optimiser step, which drives the mechanism's schedules.
      rope: rotary table of the positions.
      segment_ids: documents of packed rows; None is one document a row.
      train: whether the mechanism follows its training schedule.
      mechanism: overrides `config.attention.name` (evaluation at dense).

    Returns:
      The output in the dtype of `x` and the mechanism's f32 scalars.
    """
    q = rotate(project(x, self.wq), rope)
    k = rotate(project(x, self.wk), rope)
    v = project(x, self.wv)
    own = mechanism in (None, self.config.attention.name)
    learned = None
    if self.mechanism is not None and own:
      learned = self.mechanism(x, rope=rope)
    out, aux = base.attend(
      q,
      k,
      v,
      config=self.config.attention,
      step=step,
      segment_ids=segment_ids,
      train=train,
      learned=learned,
      mechanism=mechanism,
    )
    return project(out, self.wo, inputs=2), aux
