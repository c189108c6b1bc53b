"""Mixup and CutMix: pictures, and the loss of a mixed label."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.data.images import mixing


@pytest.mark.tier('default')
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixing_is_that_of_the_papers(kind):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 10, 10, 2)).astype(np.float32)
  alphas = {'mixup': 0.0, 'cutmix': 0.0, kind: 1.0}
  run = jax.jit(functools.partial(mixing.mix, **alphas))
  shares = []
  for seed in range(12):
    images_, share = run(jnp.asarray(x), jax.random.key(seed))
    got, share = np.asarray(images_), float(share)
    if kind == 'mixup':
      np.testing.assert_allclose(
        got, share * x + (1 - share) * x[::-1], atol=1e-6
      )
    else:
      theirs = (got == x[::-1]).all(-1)
      assert ((got == x).all(-1) | theirs).all()
      # The same box in every row, and its area is the partner's share.
      assert (theirs == theirs[:1]).all()
      assert theirs[0].mean() == pytest.approx(1 - share, abs=1e-6)
      rows, columns = theirs[0].any(1), theirs[0].any(0)
      np.testing.assert_array_equal(theirs[0], rows[:, None] & columns[None])
    shares.append(share)
  assert 0 <= min(shares) < 0.4 and 0.6 < max(shares) <= 1


@pytest.mark.tier('default')
def test_both_ways_take_turns():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 10, 1)))
  run = jax.jit(functools.partial(mixing.mix, mixup=1.0, cutmix=1.0))
  kinds = [
    bool(
      ((m := run(x, jax.random.key(s)).images) == x).any()
      | (m == x[::-1]).any()
    )
    for s in range(20)
  ]
  assert 4 < sum(kinds) < 16
