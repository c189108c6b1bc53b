"""Merged parts against attention over their union, in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import softmax
from psa_jax.kernels.block_sparse import reference
from tests import oracles

B, T, S, N, K, H, HV = 2, 5, 9, 2, 1, 4, 3


def arrays(rng, dtype=jnp.float32):
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, HV)
  return tuple(jnp.asarray(3 * rng.normal(size=s), dtype) for s in shapes)


def split(rng, parts):
  """[parts, B, K, T, S] bool: disjoint sets, empty ones among them."""
  # Some keys belong to no part, some queries to nothing at all.
  owner = rng.integers(-1, parts, size=(B, K, T, S))
  owner[:, :, 0] = -1
  owner[0, 0, 1] = 0
  return np.stack([owner == i for i in range(parts)])


def merged(q, k, v, masks):
  parts = [reference.masked_attention(q, k, v, mask, H**-0.5) for mask in masks]
  return softmax.merge(*zip(*parts, strict=True))


@jax.jit
def _merged_and_grads(q, k, v, masks, d_out, d_lse):
  def loss(q, k, v):
    out, lse = merged(q, k, v, masks)
    read = lse > -jnp.inf
    of_lse = jnp.where(read, jnp.where(read, lse, 0) * d_lse, 0).sum()
    return (out * d_out).sum() + of_lse, (out, lse)

  return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


@hypothesis.given(seed=st.integers(0, 2**31), parts=st.integers(1, 3))
def test_merge_is_attention_over_the_union(seed, parts):
  rng = np.random.default_rng(seed)
  args = arrays(rng)
  masks = split(rng, parts)
  d_out = rng.normal(size=(B, T, N, HV))
  d_lse = rng.normal(size=(B, T, N))
  grads, (out, lse) = _merged_and_grads(
    *args, masks, d_out.astype(np.float32), d_lse.astype(np.float32)
  )
  union = masks.any(0)
  want, want_lse = oracles.attention(*args, union)
  oracles.check_close(out, want, what='out')
  read = np.isfinite(want_lse)
  assert not read.all()
  np.testing.assert_array_equal(np.isfinite(lse), read)
  assert (np.asarray(lse)[~read] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[read], want_lse[read], what='lse')
  want_grads = oracles.attention_grads(
    *args, union, d_out, np.where(read, d_lse, 0)
  )
  for got, grad, what in zip(grads, want_grads, 'qkv', strict=True):
    oracles.check_close(got, grad, gradient=True, what=f'd{what}')


def test_gradients_of_outputs_and_log_sum_exps_themselves():
  """Of merge alone, by differences in float64 arithmetic of the definition."""
  rng = np.random.default_rng(0)
  outs = rng.normal(size=(3, B, T, N, HV))
  lses = 2 * rng.normal(size=(3, B, T, N))
  lses[0, 0], lses[:, 0, 0] = -np.inf, -np.inf
  d_out = rng.normal(size=outs.shape[1:])
  d_lse = rng.normal(size=lses.shape[1:])

  def loss(outs, lses):
    out, lse = softmax.merge(list(outs), list(lses))
    read = lse > -jnp.inf
    return (out * d_out).sum() + jnp.where(
      read, jnp.where(read, lse, 0) * d_lse, 0
    ).sum()

  got = jax.jit(jax.grad(loss, (0, 1)))(
    jnp.asarray(outs, jnp.float32), jnp.asarray(lses, jnp.float32)
  )
  weight = np.exp(lses)
  total = weight.sum(0)
  weight = weight / np.where(total > 0, total, 1)
  merged_out = (weight[..., None] * outs).sum(0)
  want_out = weight[..., None] * d_out
  want_lse = weight * (((outs - merged_out) * d_out).sum(-1) + d_lse)
  oracles.check_close(got[0], want_out, gradient=True)
  oracles.check_close(got[1], want_lse, gradient=True)


@pytest.mark.tier('default')
def test_merge_keeps_the_dtype_of_the_parts():
  rng = np.random.default_rng(1)
  args = arrays(rng, jnp.bfloat16)
  masks = split(rng, 3)
  out, lse = merged(*args, masks)
  assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
  want, _ = oracles.attention(*args, masks.any(0))
  oracles.check_close(out.astype(jnp.float32), want, 'bfloat16')


def test_far_apart_parts_do_not_overflow():
  out = jnp.ones((1, 1, 1, 2))
  for high in (3e38, 1e4):
    for lses in ((high, -high), (-high, high)):
      lses = [jnp.full((1, 1, 1), x) for x in lses]
      got, lse = softmax.merge([out, 2 * out], lses)
      np.testing.assert_array_equal(got, out if lses[0] > 0 else 2 * out)
      np.testing.assert_allclose(lse, high)
