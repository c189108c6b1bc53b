"""Mixup and CutMix: pictures of a batch and their labels, mixed in pairs.

Row b is mixed with row B - 1 - b, as timm does, so nothing is gathered. One
share is drawn for a batch: lam ~ Beta(alpha, alpha).

  mixup (arXiv 1710.09412)    lam x + (1 - lam) x'
  cutmix (arXiv 1905.04899)   a box of x' of 1 - lam of the area in x; lam is
                              then what is left of x, as the box may be cut off

With both, every batch gets one of them, at even odds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Mixed(NamedTuple):
  """Pictures, and how much of each is the row's own.

  Attributes:
    images: [B, S, S, C] f32.
    share: of the row's own label; the rest is that of the partner's.
  """

  images: Float[Array, 'B S S C']
  share: Float[Array, '']


def mix(
  images: Float[Array, 'B S S C'],
  key: jax.Array,
  *,
  mixup: float,
  cutmix: float,
) -> Mixed:
  """Mixes a batch.

  Args:
    images: normalised pictures.
    key: of the random numbers.
    mixup, cutmix: alpha of each; 0 is off. One of them is on.
  """
  of_mixup, of_cutmix, of_choice = jax.random.split(key, 3)
  if not cutmix:
    return _mixup(images, of_mixup, mixup)
  if not mixup:
    return _cutmix(images, of_cutmix, cutmix)
  return jax.lax.cond(
    jax.random.bernoulli(of_choice),
    lambda: _mixup(images, of_mixup, mixup),
    lambda: _cutmix(images, of_cutmix, cutmix),
  )


def partner(x: jax.Array) -> jax.Array:
  """What every row is mixed with."""
  return x[::-1]


def _mixup(images, key, alpha) -> Mixed:
  share = jax.random.beta(key, alpha, alpha)
  return Mixed(share * images + (1 - share) * partner(images), share)


def _cutmix(images, key, alpha) -> Mixed:
  size = images.shape[1]
  of_share, of_place = jax.random.split(key)
  side = jnp.sqrt(1 - jax.random.beta(of_share, alpha, alpha)) * size
  centre = jax.random.randint(of_place, (2,), 0, size)
  low = jnp.clip(jnp.round(centre - side / 2), 0, size)
  high = jnp.clip(jnp.round(centre + side / 2), 0, size)
  at = jnp.arange(size)
  rows, columns = ((at >= low[i]) & (at < high[i]) for i in range(2))
  box = (rows[:, None] & columns[None])[None, :, :, None]
  share = 1 - box.mean(dtype=jnp.float32)
  return Mixed(jnp.where(box, partner(images), images), share)
