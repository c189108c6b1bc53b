"""Learning-rate boundaries, and which arrays are decayed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError, OptimConfig
from psa_jax.train import optim

CONFIG = OptimConfig(
  learning_rate=0.5, warmup_steps=4, final_lr_ratio=0.1, decay_steps=0
)


def expected(update, *, warmup=4, end=12):
  """The rate of update number `update`, counted from 1."""
  if update <= warmup:
    return 0.5 * update / warmup
  share = min(1.0, (update - warmup) / (end - warmup))
  cosine = 0.5 * (1 + np.cos(np.pi * share))
  return 0.5 * (0.1 + 0.9 * cosine)


# first, before, at and after the end of the warm-up, before, at, after the end
@pytest.mark.parametrize('step', [0, 2, 3, 4, 10, 11, 12, 10_000])
def test_rate_at_its_boundaries(step):
  rate = jax.jit(optim.learning_rate(CONFIG, 12))(jnp.int32(step))
  assert rate.dtype == jnp.float32
  assert float(rate) == pytest.approx(expected(step + 1), rel=1e-6)


def test_the_peak_and_the_end_are_reached():
  rate = optim.learning_rate(CONFIG, 12)
  assert float(rate(3)) == 0.5
  assert float(rate(11)) == pytest.approx(0.05)


def test_without_warm_up_the_first_update_is_on_the_cosine():
  config = dataclasses.replace(CONFIG, warmup_steps=0)
  rate = optim.learning_rate(config, 12)
  assert float(rate(0)) == pytest.approx(expected(1, warmup=0))


def test_decay_steps_overrides_the_run_length():
  config = dataclasses.replace(CONFIG, decay_steps=8)
  rate = optim.learning_rate(config, 12)
  assert float(rate(7)) == pytest.approx(0.05)
  assert float(rate(11)) == pytest.approx(0.05)


@pytest.mark.parametrize('total', [3, 4])
def test_warm_up_longer_than_the_run_is_refused(total):
  with pytest.raises(ConfigError, match='optim.warmup_steps=4'):
    optim.learning_rate(CONFIG, total)


def test_only_matrices_are_decayed():
  params = {
    'embedding': jnp.ones((5, 4)),
    'layers': {
      'wq': jnp.ones((2, 4, 2, 2)),
      'w_down': jnp.ones((2, 6, 4)),
      'scale': jnp.ones((2, 4)),  # a stack of vectors, not a matrix
      'eta': jnp.ones((2,)),
    },
    'scale': jnp.ones((4,)),
    'eta': jnp.ones(()),
  }
  optimizer = optim.make_optimizer(CONFIG)

  @jax.jit
  def without_gradient(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optimizer.update(zeros, optimizer.init(params), params)[0]

  direction = without_gradient(params)
  decayed = {
    path[-1].key: bool((d == CONFIG.weight_decay).all())
    for path, d in jax.tree_util.tree_leaves_with_path(direction)
  }
  assert decayed == {
    'embedding': True,
    'wq': True,
    'w_down': True,
    'scale': False,
    'eta': False,
  }
  assert not direction['layers']['scale'].any()
