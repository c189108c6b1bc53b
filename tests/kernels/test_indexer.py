"""The indexer's scores and its divergence, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from psa_jax.kernels import indexer
from psa_jax.kernels.dense import dense_attention
from psa_jax.kernels.indexer import Index, scores
from tests import oracles

B, T, N, K, H, J, E = 2, 21, 4, 2, 6, 3, 4
BLOCK_Q, BLOCK_K = 4, 3


def arrays(seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  index = Index(normal(B, T, J, E), normal(B, T, J), normal(B, T, E))
  return index, normal(B, T, N, H), normal(B, T, K, H)


def documents():
  cut = np.stack([np.arange(T) >= 5, np.arange(T) >= 16])
  return jnp.asarray(3 + cut.astype(np.int32))


def lists(seed=1):
  """For every tile its own blocks and a few earlier ones, in any order."""
  rng = np.random.default_rng(seed)
  tiles, blocks = -(-T // BLOCK_Q), -(-T // BLOCK_K)
  ids = np.zeros((B, tiles, blocks), np.int32)
  counts = np.zeros((B, tiles), np.int32)
  for b, i in np.ndindex(B, tiles):
    last = min((i + 1) * BLOCK_Q, T) - 1
    own = set(range(i * BLOCK_Q // BLOCK_K, last // BLOCK_K + 1))
    own |= set(rng.choice(last // BLOCK_K + 1, 2).tolist())
    counts[b, i] = len(own)
    order = rng.permutation(sorted(own))
    ids[b, i] = [*order, *[10**6] * (blocks - len(own))]
  return jnp.asarray(ids), jnp.asarray(counts)


def listed(ids, counts, seg):
  """[B, T, S]: what the lists and causality let every query read."""
  read = oracles.list_mask(
    np.asarray(ids)[:, None],
    np.asarray(counts)[:, None],
    T,
    T,
    BLOCK_Q,
    BLOCK_K,
  )
  pair = None if seg is None else (seg, seg)
  return (read & oracles.causal_mask(B, 1, T, T, pair))[:, 0]


def log_sums(q, k, mask):
  mask = np.repeat(mask[:, None], K, 1)
  _, lse = oracles.attention(q, k, k, mask)
  return jnp.asarray(lse, jnp.float32)


@pytest.mark.parametrize('pooling', ['max', 'sum', 'mass'])
def test_importance_is_the_definition_whatever_the_pieces(pooling, monkeypatch):
  index, _, _ = arrays()
  starts = jnp.asarray(np.random.default_rng(2).integers(0, 9, (B, T)))
  found = []
  for room in (1 << 23, B * J * T * 4):
    monkeypatch.setattr(scores, 'ROOM', room)
    found.append(
      indexer.block_importance(
        index, starts, block_k=BLOCK_K, pooling=pooling, then=lambda x, _: x
      )
    )
  tokens = oracles.index_scores(*index)
  for b, t in np.ndindex(B, T):
    want = oracles.pool_scores(tokens[b, t], starts[b, t], BLOCK_K, pooling)
    for got in found:
      np.testing.assert_allclose(got[b, t], want, 2e-5, 1e-5)


@pytest.mark.parametrize('cut', [False, True])
def test_divergence_and_gradient_are_the_definition(cut):
  index, q, k = arrays()
  seg = documents() if cut else None
  ids, counts = lists()
  mask = listed(ids, counts, seg)
  lse = log_sums(q, k, mask)
  weight = jnp.asarray(np.random.default_rng(3).normal(size=(B, T)))

  @jax.jit
  def run(index, q, k, lse):
    kl = indexer.divergence(
      index,
      q,
      k,
      lse,
      ids,
      counts,
      block_q=BLOCK_Q,
      block_k=BLOCK_K,
      segment_ids=seg,
    )
    return (kl * weight).sum(), kl

  (_, kl), grads = jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True)(
    index, q, k, lse
  )
  want, _ = oracles.index_divergence(index, q, k, mask)
  np.testing.assert_allclose(kl, want, 1e-4, 2e-6)
  assert want.max() > 0.1
  scaled = _weighted_gradient(index, q, k, mask, np.asarray(weight))
  for got, grad in zip(grads[0], scaled, strict=True):
    oracles.check_close(got, grad, gradient=True)
  # The teacher is a constant.
  assert all((np.asarray(g) == 0).all() for g in grads[1:])


def _weighted_gradient(index, q, k, mask, weight):
  """The oracle's gradient with each query's divergence times `weight`."""
  total = None
  for t in range(T):
    only = np.zeros_like(mask)
    only[:, t] = mask[:, t]
    _, grads = _rows(index, q, k, only, t)
    grads = [g * weight[:, t].reshape(-1, *[1] * (g.ndim - 1)) for g in grads]
    total = (
      grads
      if total is None
      else [a + b for a, b in zip(total, grads, strict=True)]
    )
  return total


def _rows(index, q, k, mask, t):
  """The oracle for query t alone: other rows read nothing."""
  iq, weights, ik = index
  one = (iq[:, t : t + 1], weights[:, t : t + 1], ik)
  kl, (dq, dw, dk) = oracles.index_divergence(
    one, q[:, t : t + 1], k, mask[:, t : t + 1]
  )
  full_q, full_w = np.zeros(iq.shape), np.zeros(weights.shape)
  full_q[:, t : t + 1], full_w[:, t : t + 1] = dq, dw
  return kl, (full_q, full_w, dk)


@pytest.mark.tier('default')
def test_an_indexer_that_agrees_has_no_divergence():
  """I = log p up to a constant, for one head whose scores are positive."""
  rng = np.random.default_rng(4)
  q = jnp.asarray(np.abs(rng.normal(size=(B, T, 1, H))), jnp.float32)
  k = jnp.asarray(np.abs(rng.normal(size=(B, T, 1, H))), jnp.float32)
  index = Index(q, jnp.full((B, T, 1), H**-0.5), k[:, :, 0])
  _, lse = dense_attention(q, k, k)
  blocks, tiles = -(-T // BLOCK_K), -(-T // BLOCK_Q)
  ids = jnp.broadcast_to(jnp.arange(blocks)[None, None], (B, tiles, blocks))
  counts = jnp.full((B, tiles), blocks)
  kl = indexer.divergence(
    index, q, k, lse, ids, counts, block_q=BLOCK_Q, block_k=BLOCK_K
  )
  np.testing.assert_allclose(kl, 0, atol=2e-6)


@pytest.mark.tier('default')
def test_heads_that_a_mesh_splits_are_one_teacher():
  """The divergence of the sum over all heads, not a mean over shards."""
  index, q, k = arrays()
  _, lse = dense_attention(q, k, k)
  ids, counts = lists()
  ids = jnp.broadcast_to(jnp.arange(ids.shape[-1])[None, None], ids.shape)
  counts = jnp.full_like(counts, ids.shape[-1])
  options = dict(block_q=BLOCK_Q, block_k=BLOCK_K)

  def loss(index):
    kl = indexer.divergence(index, q, k, lse, ids, counts, **options)
    return kl.mean()

  want, want_grads = jax.value_and_grad(loss)(index)
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ('tensor',), axes)
  heads = P(None, None, 'tensor')

  def split(index, q, k, lse):
    kl = indexer.divergence(
      index, q, k, lse, ids, counts, axis='tensor', **options
    )
    return jax.lax.pmean(kl.mean(), 'tensor')

  with jax.set_mesh(mesh):
    run = jax.shard_map(
      split,
      in_specs=(P(), heads, heads, heads),
      out_specs=P(),
      check_vma=False,
    )
    got, grads = jax.jit(jax.value_and_grad(run))(index, q, k, lse)
  np.testing.assert_allclose(got, want, 1e-5)
  for a, b in zip(grads, want_grads, strict=True):
    oracles.check_close(a, b, gradient=True)
