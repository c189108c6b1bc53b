"""A model that was written for dense attention takes `psa` over.

  python examples/foreign_model.py

`Decoder` is plain Flax. Its attention layers are given `attention_fn`, and
nothing else about it changes: its weights are the same, and with everything
kept so are its outputs. What is read then falls with `keep`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import psa_jax

LENGTH, WIDTH, HEADS, VOCABULARY = 128, 64, 4, 64


class Decoder(nnx.Module):
  """Two causal layers of attention, without a word of psa_jax."""

  def __init__(self, *, rngs: nnx.Rngs, **attention):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
    self.layers = nnx.List(
      [
        nnx.MultiHeadAttention(
          HEADS, WIDTH, decode=False, rngs=rngs, **attention
        )
        for _ in range(2)
      ]
    )

  def __call__(self, tokens):
    x = self.embed(tokens)
    for norm, layer in zip(self.norms, self.layers, strict=True):
      x = x + layer(norm(x), is_causal=True)
    return self.embed.attend(x)


def main() -> None:
  """Compares the outputs of the same weights, dense and sparse."""
  tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCABULARY)
  dense = Decoder(rngs=nnx.Rngs(0))
  want = nnx.jit(dense)(tokens)
  weights = nnx.state(dense, nnx.Param)
  for keep in (1.0, 0.5, 0.25):
    read = psa_jax.attention_fn(
      'psa', keep=keep, block_q=16, block_k=8, window=16
    )
    sparse = Decoder(rngs=nnx.Rngs(0), attention_fn=read)
    nnx.update(sparse, weights)  # the parameters have the same names
    got = nnx.jit(sparse)(tokens)
    distance = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    print(f'keep={keep:.2f}: outputs differ by {distance:.2%}')


if __name__ == '__main__':
  main()
