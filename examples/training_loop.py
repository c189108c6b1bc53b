"""A training loop of one's own, with attention that becomes sparse.

  python examples/training_loop.py

Every token follows from the one before it, which a layer of attention learns in
seconds. The step is an argument of the compiled function: density falls as the
schedule says, and nothing is compiled twice.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import psa_jax

STEPS, LENGTH, WIDTH, VOCABULARY = 60, 64, 32, 16
KEEP = psa_jax.schedules.cubic(1.0, 0.5, begin=10, length=40)


class Model(nnx.Module):
  """One layer of attention between an embedding and its transpose."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.attention = psa_jax.nnx.SparseAttention(
      2,
      WIDTH,
      kind='psa',
      rotary_base=10_000,
      keep=KEEP,
      block_q=8,
      block_k=4,
      window=4,
      rngs=rngs,
    )

  def __call__(self, tokens, step):
    x = self.embed(tokens)
    out, aux = self.attention(self.norm(x), step=step, return_aux=True)
    return self.embed.attend(x + out), aux['density']


def main() -> None:
  """Trains, and prints loss and density as they fall."""
  graph, params = nnx.split(Model(rngs=nnx.Rngs(0)), nnx.Param)
  optimizer = optax.adam(1e-2)
  state, traces = optimizer.init(params), []

  @jax.jit
  def train_step(params, state, step):
    traces.append(step)  # runs when JAX traces, not when it calls
    key = jax.random.fold_in(jax.random.key(1), step)
    first = jax.random.randint(key, (8, 1), 0, VOCABULARY)
    tokens = (first + 5 * jnp.arange(LENGTH + 1)[None]) % VOCABULARY

    def loss_of(params):
      logits, density = nnx.merge(graph, params)(tokens[:, :-1], step)
      losses = optax.softmax_cross_entropy_with_integer_labels
      return losses(logits, tokens[:, 1:]).mean(), density

    (loss, density), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, density

  for step in range(STEPS):
    params, state, loss, density = train_step(params, state, step)
    if step % 10 == 0 or step == STEPS - 1:
      print(f'step {step}: loss {loss:.3f}, density {density:.1%}')
  print(f'programs compiled: {len(traces)}')


if __name__ == '__main__':
  main()
