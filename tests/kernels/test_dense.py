"""Dense attention in linear memory against the float64 definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels.dense import dense_attention, short
from psa_jax.kernels.dense import xla as xla_module
from tests import oracles, tiers

# Those of accelerators have test_dense_accelerators.py.
IMPLEMENTATIONS = ('xla', 'reference')

# name: B, T, S, N, K, H, Hv, segments, q_offset, causal
CASES = {
  'plain': (2, 64, 64, 2, 1, 16, 16, False, 0, True),
  'odd lengths': (1, 77, 77, 4, 2, 16, 24, False, 0, True),
  'documents': (2, 77, 77, 3, 1, 24, 16, True, 0, True),
  'prefill chunk': (1, 24, 61, 4, 2, 16, 16, True, 37, True),
  'bidirectional': (1, 30, 45, 2, 1, 72, 16, False, 0, False),
}


def use_small_tiles(monkeypatch):
  """So that plain, masked and partial ones all occur."""
  monkeypatch.setattr(xla_module, 'ROWS', 16)
  monkeypatch.setattr(xla_module, 'MIN_BLOCK_Q', 16)
  monkeypatch.setattr(xla_module, 'KEYS', 8)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('name', tiers.cases(CASES, quick=['odd lengths']))
def test_value_and_gradients(name, implementation, monkeypatch):
  use_small_tiles(monkeypatch)
  check(CASES[name], implementation)


def never(*args):
  raise AssertionError('a loop over tiles')


def _together():
  """Every case at one number of rows, one case at all; the rest is `all`."""
  kinds = [(1, 'float32'), (2, 'float32'), (5, 'float32'), (2, 'bfloat16')]
  for i, name in enumerate(CASES):
    for j, kind in enumerate(kinds):
      often = name == 'documents' or j == i % len(kinds)
      tier = pytest.mark.tier('default' if often else 'all')
      yield pytest.param(name, *kind, marks=tier)


@pytest.mark.parametrize(('name', 'rows', 'dtype'), list(_together()))
def test_heads_of_one_tile_are_taken_together(name, rows, dtype, monkeypatch):
  """One row of the batch at a time, two and a rest, and all."""
  _, T, S, N, *rest = CASES[name]
  monkeypatch.setattr(xla_module, '_walk', never)
  monkeypatch.setattr(short, 'SCORES', rows * N * T * S)
  check((5, T, S, N, *rest), 'xla', dtype)


def test_a_caller_may_map_over_short_attention(monkeypatch):
  monkeypatch.setattr(xla_module, '_walk', never)
  monkeypatch.setattr(short, 'SCORES', 2 * 2 * 7 * 7)
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(3, 5, 7, 2, 4)), jnp.float32) for _ in 'qkv'
  )
  call = functools.partial(dense_attention, implementation='xla')

  def loss(q, k, v):
    return (call(q, k, v)[0] ** 2).sum()

  grad = jax.grad(loss, (0, 1, 2))
  got = jax.jit(jax.vmap(grad))(q, k, v)
  alone = jax.jit(grad)
  each = [alone(*xs) for xs in zip(q, k, v, strict=True)]
  for one, *many in zip(got, *each, strict=True):
    oracles.check_close(one, jnp.stack(many), gradient=True)


@pytest.mark.parametrize('B, T, S', [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_read(B, T, S):
  q, k = jnp.ones((B, T, 2, 4)), jnp.ones((B, S, 1, 4))

  def loss(q, k):
    out, lse = dense_attention(q, k, k, causal=False)
    assert (lse == -jnp.inf).all() or not lse.size
    return out.sum()

  grads = jax.grad(loss, (0, 1))(q, k)
  assert [x.shape for x in grads] == [q.shape, k.shape]
  assert all((x == 0).all() for x in grads)


def test_long_heads_walk_over_tiles_on_a_cpu():
  x = jnp.zeros((1, 300, 1, 4))
  assert short.fits(x[:, :256], x[:, :256])
  assert not short.fits(x, x)


def check(case, implementation, dtype='float32'):
  B, T, S, N, K, H, Hv, cut, offset, causal = case
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  q, k, v = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, Hv)
  d_out, d_lse = normal(B, T, N, Hv), normal(B, T, N)
  segments, pair = {}, None
  if cut:
    seg = np.sort(rng.integers(0, 3, size=(B, max(S, offset + T))), 1)
    pair = (seg[:, offset : offset + T], seg[:, :S])
    segments = dict(
      q_segment_ids=jnp.asarray(pair[0]), kv_segment_ids=jnp.asarray(pair[1])
    )
  mask = np.ones((B, K, T, S), bool)
  if causal:
    mask = oracles.causal_mask(B, K, T, S, pair, offset)
  call = functools.partial(
    dense_attention,
    causal=causal,
    q_offset=offset,
    implementation=implementation,
    **segments,
  )

  def loss(*args):
    out, lse = call(*args)
    return (out * d_out).sum() + (lse * d_lse).sum(), (out, lse)

  step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  grads, (out, lse) = step(q, k, v)
  want, want_lse = oracles.attention(q, k, v, mask)
  oracles.check_close(out, want, dtype, what='out')
  oracles.check_close(lse, want_lse, dtype, what='lse')
  want = oracles.attention_grads(q, k, v, mask, d_out, d_lse)
  for got, grad, what in zip(grads, want, 'qkv', strict=True):
    oracles.check_close(got, grad, dtype, gradient=True, what=f'd{what}')


@pytest.mark.tier('default')
def test_a_query_that_sees_nothing_gives_zero():
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(1, 8, 1, 4)), jnp.float32) for _ in range(3)
  )
  alone = jnp.arange(8)[None]
  for implementation in IMPLEMENTATIONS:
    call = functools.partial(
      dense_attention,
      q_segment_ids=alone,
      kv_segment_ids=alone + 100,
      implementation=implementation,
    )
    out, lse = call(q, k, v)
    assert (out == 0).all() and (lse == -jnp.inf).all()
    grads = jax.grad(lambda *a, f=call: f(*a)[0].sum(), (0, 1, 2))(q, k, v)
    assert all((g == 0).all() for g in grads)
