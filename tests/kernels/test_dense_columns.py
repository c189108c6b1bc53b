"""Column sums of the softmax and value pruning, against loops in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError
from psa_jax.kernels.dense import columns, dense_attention, few_values
from psa_jax.kernels.dense.columns import column_mass, self_mass
from psa_jax.kernels.dense.few_values import few_values_attention
from tests import oracles

B, T, N, K, H, HV = 2, 37, 4, 2, 8, 12


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Several tiles, the last one partial."""
  monkeypatch.setattr(columns, 'ROWS', 20)
  monkeypatch.setattr(few_values, 'ROWS', 20)


def arrays(seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, HV)
  return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def segments():
  return jnp.asarray(
    np.stack([np.arange(T) > 11, np.arange(T) % T > 30]).astype(np.int32)
  )


def mask_of(causal, seg):
  mask = np.ones((B, K, T, T), bool)
  if causal:
    mask &= np.tril(np.ones((T, T), bool))
  if seg is not None:
    seg = np.asarray(seg)
    mask &= (seg[:, :, None] == seg[:, None])[:, None]
  return mask


def probabilities(q, k, mask):
  """[B, N, T, S] in float64."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  p = np.zeros((B, N, T, T))
  for b, n, t in np.ndindex(B, N, T):
    g = n // (N // K)
    keys = np.flatnonzero(mask[b, g, t])
    s = k[b, keys, g] @ q[b, t, n] / math.sqrt(H)
    e = np.exp(s - s.max())
    p[b, n, t, keys] = e / e.sum()
  return p


each = pytest.mark.parametrize('causal', [False, True])
cut = pytest.mark.parametrize('packed', [False, True])


@pytest.mark.tier('default')
@each
@cut
@pytest.mark.parametrize('streamed', [True, False])
def test_column_mass(causal, packed, streamed):
  q, k, v = arrays()
  seg = segments() if packed else None
  how = dict(causal=causal, q_segment_ids=seg, kv_segment_ids=seg)
  _, lse = dense_attention(q, k, v, implementation='reference', **how)
  run = functools.partial(column_mass, streamed=streamed, **how)
  got = jax.jit(run)(q, k, lse)
  want = probabilities(q, k, mask_of(causal, seg)).sum((1, 2))
  assert got.dtype == jnp.float32
  oracles.check_close(got, want)
  np.testing.assert_allclose(got.sum(1), N * T, rtol=1e-5)


def test_self_mass_is_the_diagonal():
  q, k, v = arrays()
  _, lse = dense_attention(q, k, v, implementation='reference')
  p = probabilities(q, k, mask_of(True, None))
  want = np.einsum('bntt->bt', p)
  oracles.check_close(self_mass(q, k, lse), want)
  assert self_mass(q, k, lse)[0, 0] == N


def largest(jaxpr):
  """Entries of the largest array that a program makes, loops included."""
  found = 0
  for eqn in jaxpr.eqns:
    found = max([found, *(v.aval.size for v in eqn.outvars)])
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        found = max(found, largest(inner))
  return found


@pytest.mark.tier('default')
def test_there_is_never_a_square_array():
  def both(q, lse, counts):
    few, _ = few_values_attention(q, q, q, counts, causal=False)
    return few.sum(), column_mass(q, q, lse, causal=False)

  def of(t):
    q = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, t, 1), jnp.float32)
    counts = jax.ShapeDtypeStruct((1, t), jnp.int32)
    both_grads = jax.grad(both, has_aux=True)
    return largest(jax.make_jaxpr(both_grads)(q, lse, counts).jaxpr)

  assert of(4096) == 2 * of(2048) <= 20 * 4096


@pytest.mark.tier('default')
def test_rows_that_read_nothing_have_no_mass():
  q, k, v = arrays()
  seg = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.int32)
  how = dict(causal=False, q_segment_ids=seg[0], kv_segment_ids=seg[1])
  _, lse = dense_attention(q, k, v, implementation='reference', **how)
  assert not column_mass(q, k, lse, **how).any()
  out, lse = few_values_attention(q, k, v, jnp.ones((B, T), jnp.int32), **how)
  assert not np.asarray(out).any() and np.isneginf(lse).all()


def test_no_gradient_flows_through_importance():
  q, k, v = arrays()
  _, lse = dense_attention(q, k, v, implementation='reference')

  def total(q, k, lse):
    mass = column_mass(q, k, lse, causal=True, streamed=False)
    return (mass + self_mass(q, k, lse)).sum()

  assert not any(np.any(g) for g in jax.grad(total, (0, 1, 2))(q, k, lse))


def few_values_oracle(q, k, v, counts, mask, d_out):
  """Value of the kept part, not normalised again, and its gradients."""
  p = probabilities(q, k, mask)
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((B, T, N, HV))
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b, n, t in np.ndindex(B, N, T):
    g = n // (N // K)
    row = p[b, n, t]
    top = np.argsort(-row, kind='stable')[: counts[b, t]]
    part = np.zeros(T)
    part[top] = row[top]
    out[b, t, n] = part @ v[b, :, g]
    d_row = np.zeros(T)
    d_row[top] = v[b, top, g] @ d_out[b, t, n]
    ds = row * (d_row - row @ d_row) / math.sqrt(H)
    dq[b, t, n] += ds @ k[b, :, g]
    dk[b, :, g] += ds[:, None] * q[b, t, n]
    dv[b, :, g] += part[:, None] * d_out[b, t, n]
  return out, (dq, dk, dv)


@pytest.mark.tier('default')
@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('causal, packed', [(True, True), (False, False)])
def test_few_values(implementation, causal, packed):
  q, k, v = arrays()
  seg = segments() if packed else None
  mask = mask_of(causal, seg)
  counts = -(-mask[:, 0].sum(-1) // 3)
  d_out = np.random.default_rng(3).normal(size=(B, T, N, HV))
  run = functools.partial(
    few_values_attention,
    causal=causal,
    q_segment_ids=seg,
    kv_segment_ids=seg,
    implementation=implementation,
  )

  @jax.jit
  def value_and_grads(q, k, v, counts):
    def loss(*args):
      out, lse = run(*args, counts)
      return (out * d_out).sum(), (out, lse)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  grads, (out, lse) = value_and_grads(q, k, v, jnp.asarray(counts, jnp.int32))
  want, want_grads = few_values_oracle(q, k, v, counts, mask, d_out)
  oracles.check_close(out, want)
  full, full_lse = oracles.attention(q, k, v, mask)
  oracles.check_close(lse, full_lse)
  for got, grad in zip(grads, want_grads, strict=True):
    oracles.check_close(got, grad, gradient=True)
  # The dropped mass is lost, not handed to the others.
  assert np.linalg.norm(out - full) > 0.05 * np.linalg.norm(full)


def test_all_values_are_dense_attention():
  q, k, v = arrays()
  mask = mask_of(True, None)
  counts = jnp.asarray(mask[:, 0].sum(-1), jnp.int32)
  out, _ = few_values_attention(q, k, v, counts)
  oracles.check_close(out, oracles.attention(q, k, v, mask)[0])


def test_an_accelerator_kernel_is_refused():
  q, k, v = arrays()
  with pytest.raises(ConfigError, match='value pruning has no implementation'):
    few_values_attention(
      q, k, v, jnp.ones((B, T), jnp.int32), implementation='cudnn'
    )
