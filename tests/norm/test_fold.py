"""Folding by its algebra: against the norm, and the layer beside it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax.config import NormConfig
from psa_jax.norm import Norm
from psa_jax.norm.fold import ScaleShift, into_following, into_preceding

pytestmark = pytest.mark.tier('default')

D = 6


def trained(kind, seed=0):
  """A norm at gamma = 0 with no value where it began, and its arrays."""
  config = NormConfig(
    kind, base='layernorm', warmup_steps=0, decay_steps=0, scale_init=1.0
  )
  norm = Norm(D, config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(seed)
  for name, low in (
    ('bn_scale', -1),
    ('bn_bias', -1),
    ('eta', 0.5),
    ('mean', -2),
    ('var', 0.1),
  ):
    if hasattr(norm, name):
      variable = getattr(norm, name)
      variable[...] = jnp.asarray(
        rng.uniform(low, 2, variable.shape), jnp.float32
      )
  params = nnx.to_pure_dict(nnx.state(norm, nnx.Param))
  statistics = nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))
  return norm, ScaleShift.of(params, statistics, config.bn_eps)


def normal(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('kind', ['batchnorm', 'repbn', 'prepbn'])
def test_scale_and_shift_are_the_norm(kind):
  norm, folded = trained(kind)
  x = normal(50, D)
  want = norm(jnp.asarray(x), step=0, train=False)
  np.testing.assert_allclose(x * folded.scale + folded.shift, want, atol=1e-5)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('out', [(5,), (3, 4)], ids=str)
@pytest.mark.parametrize('kind', ['batchnorm', 'repbn', 'prepbn'])
def test_into_the_following_layer(kind, out, with_bias):
  norm, folded = trained(kind)
  x, kernel, bias = normal(50, D), normal(D, *out, seed=2), normal(*out, seed=3)
  y = np.asarray(norm(jnp.asarray(x), step=0, train=False), np.float64)
  want = np.einsum('td,d...->t...', y, kernel) + (bias if with_bias else 0)
  kernel, bias = into_following(folded, kernel, bias if with_bias else None)
  assert kernel.dtype == bias.dtype == np.float32 and bias.shape == out
  got = np.einsum('td,d...->t...', x, kernel) + bias
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('inputs', [(5,), (3, 4)], ids=str)
@pytest.mark.parametrize('kind', ['batchnorm', 'repbn', 'prepbn'])
def test_into_the_preceding_layer(kind, inputs, with_bias):
  """With eta and bias non-zero: what the paper's code leaves out counts."""
  norm, folded = trained(kind)
  x = normal(50, *inputs)
  kernel, bias = normal(*inputs, D, seed=2), normal(D, seed=3)
  axes = [*range(1, x.ndim)], [*range(len(inputs))]
  before = np.tensordot(x, kernel, axes) + (bias if with_bias else 0)
  want = norm(jnp.asarray(before, jnp.float32), step=0, train=False)
  kernel, bias = into_preceding(folded, kernel, bias if with_bias else None)
  assert kernel.dtype == bias.dtype == np.float32 and bias.shape == (D,)
  got = np.tensordot(x, kernel, axes) + bias
  np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


def test_layers_that_are_stacked_fold_one_by_one():
  parts = [trained('repbn', seed)[1] for seed in (0, 1, 2)]
  stacked = ScaleShift(*(np.stack(x) for x in zip(*parts, strict=True)))
  kernel, bias = normal(3, D, 4, 2), normal(3, 4, 2, seed=2)
  after = into_following(stacked, kernel, bias)
  back, shift = normal(3, 4, 2, D), normal(3, D, seed=2)
  before = into_preceding(stacked, back, shift)
  for i, part in enumerate(parts):
    for got, want in (
      (after, into_following(part, kernel[i], bias[i])),
      (before, into_preceding(part, back[i], shift[i])),
    ):
      for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x[i], y)


@hypothesis.given(seed=st.integers(0, 1000))
def test_a_mean_over_tokens_may_lie_between(seed):
  """The head of a classifier reads pooled tokens."""
  norm, folded = trained('repbn', seed)
  x, kernel = normal(9, D, seed=seed), normal(D, 3, seed=seed + 1)
  want = np.asarray(norm(jnp.asarray(x), step=0, train=False)).mean(0) @ kernel
  kernel, bias = into_following(folded, kernel)
  np.testing.assert_allclose(x.mean(0) @ kernel + bias, want, atol=2e-5)


def test_low_precision_is_rounded_once():
  _, folded = trained('repbn')
  kernel = jnp.asarray(normal(D, 4), jnp.bfloat16)
  got, bias = into_following(folded, kernel)
  assert got.dtype == bias.dtype == jnp.bfloat16
  exact = np.asarray(kernel, np.float64) * folded.scale[:, None]
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
  assert jax.numpy.asarray(got).dtype == jnp.bfloat16
