"""Vision Transformer: patches of a picture are the tokens.

Patches are cut without overlap, projected, and get a learned position each
(arXiv 2010.11929); there is no class token: the head reads the mean of the
tokens behind the final norm, which folds into it as into any layer that
follows. DeiT's blocks are those of `blocks.py` with `mlp=gelu` and `biases`.
Rotary positions are not used, so `model.rope_theta` does nothing.

Not done: pictures of another size than `model.image.size`.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.projections import fan_in
from psa_jax.config import ModelConfig
from psa_jax.models.transformer import Backbone, ModelOut

# Standard deviation of the initial positions: that of the projected patches. At
# DeiT's 0.02 small sets learn slowly where things are: 300 steps of
# configs/vit_digits.py:layernorm without shift end at 89 % and not at 96 %.
_PLACES = 1.0


class ViT(Backbone):
  """Patches, blocks, and a linear head on the mean of the tokens.

  Attributes:
    patches: [P, D] for the P = patch * patch * channels numbers of a patch,
      and patches_bias [D].
    places: [T, D] learned positions, row by row of the picture.
    head: [D, classes], zero-initialised, and head_bias [classes].
  """

  causal = False

  def __init__(self, config: ModelConfig, classes: int, *, rngs: nnx.Rngs):
    """Creates the parameters.

    Args:
      config: the model; `image` says what a picture is.
      classes: size of the output.
      rngs: the stream `params` draws the initial values.
    """
    dtype, width = jnp.dtype(config.param_dtype), config.d_model
    image = config.image
    tokens = (image.size // image.patch) ** 2
    shape = (image.patch**2 * image.channels, width)
    self.patches = nnx.Param(fan_in(0, 1)(rngs.params(), shape, dtype))
    self.patches_bias = nnx.Param(jnp.zeros((width,), dtype))
    places = nnx.initializers.normal(_PLACES)
    self.places = nnx.Param(places(rngs.params(), (tokens, width), dtype))
    super().__init__(config, rngs=rngs)
    self.head = nnx.Param(jnp.zeros((width, classes), dtype))
    self.head_bias = nnx.Param(jnp.zeros((classes,), dtype))

  def __call__(
    self,
    images: Float[Array, 'B S S C'],
    *,
    context: AttentionContext,
  ) -> ModelOut:
    """Runs the model up to the final norm.

    Args:
      images: pictures of the size and channels of `config.image`.
      context: step, budget, and whether training.

    Raises:
      ValueError: pictures of another shape.
    """
    return self.forward(self.embed(images), context=context)

  def embed(self, images: Float[Array, 'B S S C']) -> Float[Array, 'B T D']:
    """Patches as tokens, row by row."""
    image, dtype = self.config.image, self.config.compute_dtype
    size, p = image.size, image.patch
    if images.shape[1:] != (size, size, image.channels):
      raise ValueError(
        f'images {images.shape} must be [B, {size}, {size}, {image.channels}]'
      )
    n = size // p
    cut = images.reshape(-1, n, p, n, p, image.channels)
    cut = cut.swapaxes(2, 3).reshape(-1, p * p * image.channels)
    x = cut.astype(dtype) @ self.patches[...].astype(dtype)
    x = x.reshape(-1, n * n, x.shape[-1])
    shift = self.patches_bias[...][None] + self.places[...]
    return x + shift.astype(dtype)[None]

  def classify(self, hidden: Float[Array, 'B T D']) -> Float[Array, 'B V']:
    """Logits in f32 from what `__call__` gives."""
    pooled = hidden.astype(jnp.float32).mean(1)
    head = self.head[...].astype(jnp.float32)
    return pooled @ head + self.head_bias[...].astype(jnp.float32)[None]
