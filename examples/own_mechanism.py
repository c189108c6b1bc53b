"""A mechanism of one's own, registered, used like those of the package.

  python examples/own_mechanism.py

`strided` reads the newest `window` keys and every `stride`-th one before them
(Sparse Transformers, arXiv 1904.10509, section 4.3), written down densely: it
says *which* keys, and leaves it at that. A kernel that reads block lists, as in
`psa_jax/attention/psa.py`, would also save the work.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

import psa_jax
from psa_jax.config import ConfigError, MechanismConfig
from psa_jax.config.fields import COUNT, number


@dataclass(frozen=True)
class StridedConfig(MechanismConfig):
  """How near and how far keys are read."""

  window: int = number(32, COUNT)
  stride: int = number(32, COUNT)


def strided(q, k, v, *, config, context, learned=None):
  """The function of arrays; `context` has the step, documents and the rest."""
  del learned  # no parameters
  T, settings = q.shape[1], config.strided
  t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
  near = t - s < settings.window
  read = (s <= t) & (near | (s % settings.stride == settings.stride - 1))
  visible = jnp.broadcast_to((s <= t)[None], (q.shape[0], T, T))
  if context.segment_ids is not None:
    ids = context.segment_ids
    visible = visible & (ids[:, :, None] == ids[:, None, :])
  read = visible & read[None]
  out = jax.nn.dot_product_attention(q, k, v, mask=read[:, None])
  return psa_jax.AttnOut(out, {'density': read.sum() / visible.sum()})


psa_jax.register(
  psa_jax.MechanismSpec(
    name='strided', function=strided, config=StridedConfig, causal_only=True
  )
)


def main() -> None:
  """Calls it by its name, with its settings as keywords."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 4, 16))
  for stride in (32, 8, 1):
    out, aux = psa_jax.attention(
      q, k, v, kind='strided', stride=stride, is_causal=True, return_aux=True
    )
    dense = psa_jax.attention(q, k, v, kind='dense', is_causal=True)
    distance = jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense)
    density = float(aux['density'])
    print(f'stride={stride}: density {density:.1%}, off by {distance:.1%}')
  try:
    psa_jax.attention(q, k, v, kind='strided', stride=0, is_causal=True)
  except ConfigError as error:
    print(f'refused: {error}')


if __name__ == '__main__':
  main()
