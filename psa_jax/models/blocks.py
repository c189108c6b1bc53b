"""The pre-norm Transformer block: attention, feed-forward, their residuals.

  x = x + Attention(Norm(x))
  x = x + W_down (silu(W_gate n) * W_up n),  n = Norm(x)

The second is SwiGLU (arXiv 2002.05202, equation 6); `model.mlp=gelu` is
W_down gelu(W_up n), the layer of vision Transformers. Products run in the
compute dtype with f32 accumulation inside, the norms in f32; the residual
stream has the compute dtype. Kernels are truncated normals scaled by fan-in;
the two that write to the residual stream start smaller by 1 / sqrt(2 L), so
that the stream's variance does not grow with depth (GPT-2).

`drop.py` leaves some of it out in training.

Not done: mixtures of experts.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.cascade.attention import Importance, Pruning
from psa_jax.attention.cascade.layer import attend_pruned
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.projections import bias_of, fan_in, project
from psa_jax.config import ConfigError, ModelConfig
from psa_jax.models.drop import Drop, leave_out
from psa_jax.norm import Norm
from psa_jax.quant.progressive import OFF, Quantizer

# What `remat='attention'` keeps; the kernels tag these values themselves.
KEPT_NAMES = ('attn_out', 'attn_lse', 'attn_ids', 'attn_counts')


def remat(function, kind: str, *, in_scan: bool):
  """Wraps a layer so that its backward pass recomputes what `kind` drops.

  Args:
    function: the layer as a function of arrays.
    kind: `none`, `full`, or `attention` (recompute all but attention's
      output, normaliser and block list).
    in_scan: inside `lax.scan` nothing can be merged with the forward pass,
      so the barrier against it is left out.

  Raises:
    ConfigError: an unknown kind.
  """
  if kind == 'none':
    return function
  if kind == 'full':
    policy = None
  elif kind == 'attention':
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES)
  else:
    raise ConfigError(
      f'unknown model.remat {kind!r}; one of none, full, attention'
    )
  return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


class FeedForward(nnx.Module):
  """w_up [D, F], w_down [F, D], in SwiGLU w_gate [D, F], and their biases."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the parameters."""
    dtype = jnp.dtype(config.param_dtype)
    shape = (config.d_model, config.mlp_dim)
    widen = fan_in(0, 1)
    narrow = fan_in(0, 1, scale=1 / (2 * config.num_layers))
    gate = bias = None
    if config.mlp == 'swiglu':
      gate = nnx.Param(widen(rngs.params(), shape, dtype))
      bias = bias_of(config, config.mlp_dim)
    self.w_gate, self.b_gate = gate, bias
    self.w_up = nnx.Param(widen(rngs.params(), shape, dtype))
    self.w_down = nnx.Param(narrow(rngs.params(), shape[::-1], dtype))
    self.b_up = bias_of(config, config.mlp_dim)
    self.b_down = bias_of(config, config.d_model)

  def __call__(
    self, x: Float[Array, 'B T D'], quantizer: Quantizer = OFF
  ) -> Float[Array, 'B T D']:
    """Applies the layer in the dtype of `x`, quantised if that is asked for."""
    linear = functools.partial(project, quantizer=quantizer)
    up = linear(x, self.w_up, self.b_up)
    if self.w_gate is None:
      hidden = jax.nn.gelu(up, approximate=False)
    else:
      hidden = jax.nn.silu(linear(x, self.w_gate, self.b_gate)) * up
    return linear(hidden, self.w_down, self.b_down)


class Block(nnx.Module):
  """One layer of a decoder, or of an encoder."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates both halves and the norm in front of each."""
    dtype = jnp.dtype(config.param_dtype)

    def norm():
      return Norm(config.d_model, config.norm, param_dtype=dtype, rngs=rngs)

    self.config, self.quant = config, config.quant
    self.attention_norm = norm()
    self.attention = SelfAttention(config, rngs=rngs)
    self.mlp_norm = norm()
    self.mlp = FeedForward(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    context: AttentionContext,
    drop: Drop | None = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
    """Returns the new residual stream and attention's f32 scalars.

    Args:
      x: residual stream.
      context: what varies by call.
      drop: what is left out in training.
    """
    normed = normalise(self.attention_norm, x, context)
    attended, aux = self.attention(normed, context=context)
    x = x + leave_out(drop, attended, 0, self.config)
    quantizer = Quantizer.at(self.quant, context.step, train=context.train)
    fed = self.mlp(normalise(self.mlp_norm, x, context), quantizer)
    return x + leave_out(drop, fed, 1, self.config), aux

  def pruned(
    self,
    x: Float[Array, 'B T D'],
    pruning: Pruning,
    *,
    context: AttentionContext,
    drop: Drop | None = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array], Importance]:
    """`__call__` on what cascade pruning left; see `attend_pruned`."""
    attended, aux, importance = attend_pruned(
      self.attention,
      normalise(self.attention_norm, x, context),
      pruning,
      context=context,
    )
    x = x + leave_out(drop, attended, 0, self.config)
    fed = self.mlp(normalise(self.mlp_norm, x, context))
    return x + leave_out(drop, fed, 1, self.config), aux, importance


def normalise(
  norm: Norm, x: Float[Array, 'B T D'], context: AttentionContext
) -> Float[Array, 'B T D']:
  """A norm at the context's step, over the tokens that count."""
  return norm(x, step=context.step, train=context.train, mask=context.mask)
