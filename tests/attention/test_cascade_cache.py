"""Pruning of the cache while decoding, against a loop over steps in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention.cascade import cache as cascade_cache
from psa_jax.attention.cascade.cache import PrunedCache
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, N, K, H, HV = 2, 4, 2, 8, 6
ROOM = 20
STEPS = 24


def empty(room=ROOM):
  return PrunedCache(
    jnp.zeros((B, room, K, H)),
    jnp.zeros((B, room, K, HV)),
    jnp.zeros((B, room), jnp.int32),
    jnp.zeros((B, room)),
    jnp.zeros((B,), jnp.int32),
  )


def stream(seed=0):
  rng = np.random.default_rng(seed)
  shapes = (STEPS, B, 1, N, H), (STEPS, B, 1, K, H), (STEPS, B, 1, K, HV)
  return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


@jax.jit
def decode(cache, q, k, v, position):
  cache = cascade_cache.append(cache, k, v, position)
  return cascade_cache.attend(q, cache, implementation='xla')


prune = jax.jit(cascade_cache.prune, static_argnames=('room', 'recent'))


def generate(keep, every, recent=1, prune=prune):
  """Decodes all steps, pruning to `keep` tokens after every `every` steps."""
  q, k, v = stream()
  cache, outs, held = empty(), [], []
  for step in range(STEPS):
    position = jnp.full((B,), step, jnp.int32)
    out, cache = decode(cache, q[step], k[step], v[step], position)
    outs.append(out)
    if (step + 1) % every == 0:
      counts = jnp.full((B,), keep, jnp.int32)
      cache = prune(cache, counts, room=ROOM, recent=recent)
    held.append(
      [
        np.asarray(cache.positions[b, : cache.lengths[b]]).tolist()
        for b in range(B)
      ]
    )
  return outs, held, cache


def oracle(keep, every, recent=1):
  outs = np.zeros((STEPS, B, 1, N, HV))
  held = [[None] * B for _ in range(STEPS)]
  q, k, v = (x.astype(np.float64) for x in stream())
  for b in range(B):
    left, mass = [], {}
    for step in range(STEPS):
      left, mass = [*left, step], mass | {step: 0.0}
      for n in range(N):
        g = n // (N // K)
        s = k[left, b, 0, g] @ q[step, b, 0, n] / math.sqrt(H)
        p = np.exp(s) / np.exp(s).sum()
        outs[step, b, 0, n] = p @ v[left, b, 0, g]
        for j, share in zip(left, p, strict=True):
          mass[j] += share
      if (step + 1) % every == 0:
        fresh = set(left[len(left) - recent :])
        ranked = sorted(left, key=lambda j: (j not in fresh, -mass[j]))
        left = sorted(ranked[:keep])
      held[step][b] = list(left)
  return outs, held


@pytest.mark.parametrize(
  'keep, every, recent', [(5, 4, 1), (9, 7, 3), (3, 2, 0)]
)
def test_generation_equals_the_oracle(keep, every, recent):
  """Importance is summed over all steps, and what is gone stays gone."""
  outs, held, _ = generate(keep, every, recent)
  want, want_held = oracle(keep, every, recent)
  assert held == want_held
  for got, right in zip(outs, want, strict=True):
    oracles.check_close(got, right)
  for b in range(B):
    for step in range(1, STEPS):
      assert set(held[step][b]) <= {*held[step - 1][b], step}


def test_nothing_pruned_is_plain_decoding():
  outs, held, cache = generate(ROOM, 4)
  assert held[-1][0] == list(range(ROOM)), 'what has no room is lost'
  full, _ = oracle(STEPS, STEPS + 1)
  for got, want in zip(outs[:ROOM], full, strict=False):
    oracles.check_close(got, want)
  np.testing.assert_allclose(cache.importance[:, : ROOM - 1].sum() > 0, True)


def test_the_arrays_really_shrink_and_counts_are_traced():
  _, _, cache = generate(ROOM, STEPS + 1)
  for count in (3, 6):
    small = prune(cache, jnp.full((B,), count, jnp.int32), room=8)
    assert small.k.shape == (B, 8, K, H) and small.v.shape == (B, 8, K, HV)
    assert small.lengths.tolist() == [count] * B
  uneven = prune(cache, jnp.asarray([2, 99], jnp.int32), room=8)
  assert uneven.lengths.tolist() == [2, 8]
  at = np.asarray(uneven.positions)
  assert (np.diff(at[1]) > 0).all()
  np.testing.assert_array_equal(uneven.k[1], cache.k[1][at[1]])
  grown = prune(cache, jnp.asarray([2, 99], jnp.int32), room=30)
  assert grown.k.shape[1] == 30 and grown.lengths.tolist() == [2, ROOM]


def test_a_token_that_the_layer_in_front_dropped_does_not_stay():
  _, _, cache = generate(ROOM, STEPS + 1)
  held = np.ones((B, STEPS), bool)
  counts = jnp.full((B,), 4, jnp.int32)
  best = np.asarray(prune(cache, counts, room=4).positions)
  held[0, best[0, 0]] = False
  got = prune(cache, counts, room=4, held=jnp.asarray(held))
  assert best[0, 0] not in got.positions[0]
  np.testing.assert_array_equal(got.positions[1], best[1])
  held[0, 3:] = False
  got = prune(cache, counts, room=4, held=jnp.asarray(held))
  assert got.lengths.tolist() == [len(np.flatnonzero(held[0])), 4]


def test_importance_starts_from_the_prompt():
  """A cache that was filled by prefill carries its column sums on."""
  _, _, cache = generate(ROOM, STEPS + 1)
  lifted = cache._replace(importance=cache.importance.at[:, 2].add(100))
  one = prune(lifted, jnp.full((B,), 2, jnp.int32), room=4)
  assert one.positions[:, 0].tolist() == [2, 2]
