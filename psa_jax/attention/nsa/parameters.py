"""What NSA learns: gates, keys and values of its branches, compression.

The layer's own keys and values are those of the selected branch. The other
two have a pair each, as in section 3.3.3 of arXiv 2502.11089, which keeps one
branch from doing the others' work; `share_kv` gives all three the layer's.
Gates are sigmoid(MLP(x)), one a head and branch, and not normalised
(equation 5).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.projections import fan_in, head_dim, project
from psa_jax.attention.rotary import Rotary, rotate
from psa_jax.config import ModelConfig
from psa_jax.types import Learned

BRANCHES = ('compress', 'select', 'window')
NETWORK = ('k_place', 'k_in', 'k_out', 'v_place', 'v_in', 'v_out')


class NsaParameters(nnx.Module):
  """The parameters of one layer.

  Attributes:
    gate_in: [D, F], gate_out: [F, N, 3]; branches as in `BRANCHES`.
    wk_compress, wv_compress, wk_window, wv_window: [D, K, H]; absent with
      `share_kv`.
    k_place, v_place: [l, H]; k_in, v_in: [l, H, F]; k_out, v_out: [F, H].
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the arrays."""
    cfg, width = config.attention.nsa, head_dim(config)
    dtype = jnp.dtype(config.param_dtype)

    def make(shape, inputs, outputs, scale=1.0):
      init = fan_in(inputs, outputs, scale=scale)
      return nnx.Param(init(rngs.params(), shape, dtype))

    self.gate_in = make((config.d_model, cfg.gate_dim), 0, 1)
    self.gate_out = make(
      (cfg.gate_dim, config.num_heads, len(BRANCHES)), 0, (1, 2)
    )
    self.share_kv = cfg.share_kv
    if not cfg.share_kv:
      shape = (config.d_model, config.num_kv_heads, width)
      self.wk_compress = make(shape, 0, (1, 2))
      self.wv_compress = make(shape, 0, (1, 2))
      self.wk_window = make(shape, 0, (1, 2))
      self.wv_window = make(shape, 0, (1, 2))
    block, hidden = cfg.compress_block, cfg.compress_dim
    # Silu halves what it is given; a factor of 2 keeps keys as large as they
    # are, up to the rest of it.
    for name in ('k', 'v'):
      place = make((block, width), 1, 0, scale=0.02)
      setattr(self, f'{name}_place', place)
      setattr(self, f'{name}_in', make((block, width, hidden), (0, 1), 2, 2.0))
      setattr(self, f'{name}_out', make((hidden, width), 0, 1, 2.0))

  def __call__(self, x: Float[Array, 'B T D'], *, rope: Rotary) -> Learned:
    """Computes what the mechanism needs of every token.

    Args:
      x: the layer's input, normalised, in the compute dtype.
      rope: rotary table of the positions.

    Returns:
      Heads: `gates` [B, T, N, 3] in f32; `k_compress` (not rotated),
      `v_compress`, `k_window` and `v_window` unless shared. Tokens: the
      table, `cos` and `sin`. Weights: the networks.
    """
    hidden = jax.nn.silu(project(x, self.gate_in))
    gates = project(hidden, self.gate_out).astype(jnp.float32)
    heads = {'gates': jax.nn.sigmoid(gates)}
    if not self.share_kv:
      heads |= {
        'k_compress': project(x, self.wk_compress),
        'v_compress': project(x, self.wv_compress),
        'k_window': rotate(project(x, self.wk_window), rope),
        'v_window': project(x, self.wv_window),
      }
    tokens = {
      name: jnp.broadcast_to(table, (*x.shape[:2], table.shape[-1]))
      for name, table in (('cos', rope.cos), ('sin', rope.sin))
    }
    weights = {name: getattr(self, name)[...] for name in NETWORK}
    return Learned(heads, tokens, weights)
