"""What NSA learns: shapes, values, axis names, and that all of it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.nsa import NsaConfig
from psa_jax.attention.nsa.parameters import NsaParameters
from psa_jax.attention.rotary import rotary
from psa_jax.config import AttentionConfig, ModelConfig, ScheduleConfig
from tests.attention.nsa_oracle import rotate, silu

pytestmark = pytest.mark.tier('default')

NSA = NsaConfig(
  compress_block=4,
  stride=2,
  select_block=8,
  blocks=ScheduleConfig(init=3.0),
  window=4,
  tile=4,
  compress_dim=7,
  gate_dim=5,
)
CONFIG = ModelConfig(
  num_layers=3,
  d_model=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  attention=AttentionConfig(name='nsa', nsa=NSA),
)


def configured(share=False, name='nsa'):
  nsa = dataclasses.replace(NSA, share_kv=share)
  attention = AttentionConfig(name=name, nsa=nsa)
  return dataclasses.replace(CONFIG, attention=attention)


def table(T):
  return rotary(jnp.arange(T)[None], head_dim=6, theta=100.0)


def test_values_against_numpy():
  module = NsaParameters(configured(), rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 12)), jnp.float32)
  got = module(x, rope=table(9))
  w = {
    n: np.asarray(p[...], np.float64)
    for n, p in vars(module).items()
    if isinstance(p, nnx.Param)
  }
  hidden = silu(np.asarray(x) @ w['gate_in'])
  gates = 1 / (1 + np.exp(-np.einsum('btf,fnc->btnc', hidden, w['gate_out'])))
  np.testing.assert_allclose(got.heads['gates'], gates, 1e-5)
  angle = np.arange(9)[:, None] * 100.0 ** (-np.arange(3) / 3)
  for name in ('k_compress', 'v_compress', 'k_window', 'v_window'):
    want = np.einsum('btd,dkh->btkh', x, w[f'w{name}'])
    if name == 'k_window':  # the only one with positions
      want = rotate(want, angle[None, :, None])
    np.testing.assert_allclose(got.heads[name], want, 1e-4, 1e-5)
  assert got.tokens['cos'].shape == (2, 9, 3)
  np.testing.assert_allclose(got.tokens['sin'][1], np.sin(angle), 1e-4, 1e-6)
  shapes = {n: a.shape for n, a in got.weights.items()}
  assert shapes == {
    'k_place': (4, 6),
    'k_in': (4, 6, 7),
    'k_out': (7, 6),
    'v_place': (4, 6),
    'v_in': (4, 6, 7),
    'v_out': (7, 6),
  }


def test_networks_of_keys_and_values_differ():
  module = NsaParameters(configured(), rngs=nnx.Rngs(0))
  assert not np.array_equal(module.k_in[...], module.v_in[...])


@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('name', ['nsa', 'nsa_tile'])
def test_every_parameter_learns_and_has_axis_names(name, share):
  layer = SelfAttention(configured(share, name), rngs=nnx.Rngs(0))
  graph, state = nnx.split(layer)
  state = nnx.as_pure(state)
  paths = jax.tree_util.tree_leaves_with_path(state)
  names = {sharding._last_name(path) for path, _ in paths}
  assert ('wk_window' in names) == (not share)
  for path, leaf in paths:
    assert len(sharding.axis_names(path, leaf)) == leaf.ndim
  x = jnp.asarray(
    np.random.default_rng(1).normal(size=(2, 21, 12)), jnp.float32
  )

  def loss(state):
    out, _ = nnx.merge(graph, state)(
      x, context=AttentionContext(step=0, rope=table(21), train=True)
    )
    return (out**2).sum()

  grads = jax.jit(jax.grad(loss))(state)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all() and (np.asarray(grad) != 0).any(), path


def test_another_mechanism_ignores_them():
  """Evaluation with dense attention reads the same projections."""
  layer = SelfAttention(configured(), rngs=nnx.Rngs(0))
  layer.config = dataclasses.replace(
    layer.config, attention=layer.config.attention.read_by('dense')
  )
  x = jnp.asarray(
    np.random.default_rng(1).normal(size=(2, 21, 12)), jnp.float32
  )
  out, aux = layer(
    x, context=AttentionContext(step=0, rope=table(21), train=False)
  )
  assert out.shape == x.shape and aux['density'] == 1
