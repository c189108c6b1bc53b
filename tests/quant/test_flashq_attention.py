"""Attention over the packed cache against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.quant.flashq_attention import flashq_attention
from tests import oracles, tiers
from tests.quant.test_flashq_cache import (
  BLOCK,
  HV,
  ROOM,
  B,
  H,
  K,
  jitted,
  new_cache,
  normal,
  read_all,
  sample,
)


def filled(lengths, low_heads=1, heads=K, seed=1):
  arrays = sample(seed, ROOM, heads)
  cache, (_, fill) = new_cache(low_heads, heads=heads), jitted()
  return fill(cache, *map(jnp.asarray, arrays), jnp.asarray(lengths)), arrays


def floats(cache):
  """Float64 keys and values [B, ROOM, K, width] of everything in the cache."""
  found = []
  for store in (cache.keys, cache.values):
    ids = jnp.broadcast_to(jnp.arange(ROOM // BLOCK)[None, None], (B, K, 4))
    both = read_all(store, ids)
    (ints, scale), (recent, recent_scale) = jax.tree.map(np.asarray, both)
    x = ints * np.float64(scale)[..., None, None]
    for b in range(B):
      last = int(cache.lengths[b]) // BLOCK
      if last < ROOM // BLOCK:
        x[b, :, last] = recent[b] * np.float64(recent_scale)[b, :, None, None]
    found.append(np.moveaxis(x.reshape(B, K, ROOM, -1), 1, 2))
  return found


def lists(seed=0):
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.permutation(ROOM // BLOCK) for _ in range(B * K)])
  counts = rng.integers(0, 5, size=(B, K))
  counts[0], counts[1, 0] = 4, 0
  ids = np.where(np.arange(4) < counts.reshape(-1, 1), ids, 10**6)
  return ids.reshape(B, K, 4).astype(np.int32), counts.astype(np.int32)


ALL = np.tile(np.arange(4), (B, K, 1)), np.full((B, K), 4)


@jax.jit
def attend(q, cache, ids, counts):
  return flashq_attention(q, cache, ids, counts)


@pytest.mark.parametrize('T', tiers.cases([1, 3], quick=[3]))
@pytest.mark.parametrize('group', tiers.cases([1, 3], quick=[3]))
@pytest.mark.parametrize('lengths', [(32, 17, 8), (0, 1, 31)])
def test_attention_reads_the_listed_blocks(T, group, lengths):
  cache, _ = filled(lengths)
  q = 3 * normal(B, T, K * group, H, seed=5)
  ids, counts = lists()
  out, lse = attend(jnp.asarray(q), cache, ids, counts)
  mask = oracles.decode_mask(ids, counts, lengths, T, ROOM, BLOCK)
  want, want_lse = oracles.attention(q, *floats(cache), mask)
  oracles.check_close(out, want)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
  assert out.shape == (B, T, K * group, HV)


@pytest.mark.tier('default')
def test_what_is_not_listed_is_not_read():
  """Other codes in unlisted blocks change no bit; in listed ones they do."""
  cache, _ = filled((32, 32, 32))
  q = jnp.asarray(normal(B, 1, K, H, seed=5))
  ids = np.tile(np.asarray([2, 0], np.int32), (B, K, 1))
  counts = np.full((B, K), 2)
  want = attend(q, cache, ids, counts)[0]

  def spoiled(block):
    def spoil(group):
      return group._replace(
        codes=group.codes.at[:, :, block].set(91),
        scale=group.scale.at[:, :, block].mul(50),
      )

    stores = [
      s._replace(high=spoil(s.high), low=spoil(s.low))
      for s in (cache.keys, cache.values)
    ]
    other = cache._replace(keys=stores[0], values=stores[1])
    return attend(q, other, ids, counts)[0]

  for block in (1, 3):
    np.testing.assert_array_equal(spoiled(block), want)
  for block in (0, 2):
    assert not np.array_equal(spoiled(block), want)


def test_decoding_token_by_token_over_a_growing_cache():
  """Each step equals float64 attention over what the cache then holds."""
  add, _ = jitted()
  cache, _ = filled((9, 7, 16))
  for i in range(12):
    cache = add(cache, *map(jnp.asarray, sample(30 + i, 1)))
    q = normal(B, 1, K, H, seed=60 + i)
    out, _ = attend(jnp.asarray(q), cache, *ALL)
    mask = oracles.decode_mask(*ALL, cache.lengths, 1, ROOM, BLOCK)
    oracles.check_close(out, oracles.attention(q, *floats(cache), mask)[0])


@pytest.mark.tier('default')
def test_the_error_of_attention_by_bits():
  """If no score moves by more than d, the output moves by at most
  (exp(2 d) - 1) max|v| and what the values are off by.
  """
  lengths, lost = (ROOM,) * B, {}
  q = normal(B, 1, K, H, seed=5)
  mask = oracles.decode_mask(*ALL, lengths, 1, ROOM, BLOCK)
  for name, low_heads in (('4 bits', 0), ('mixed', 1), ('2 bits', K)):
    cache, (k, v) = filled(lengths, low_heads)
    out = np.asarray(attend(jnp.asarray(q), cache, *ALL)[0])
    want = oracles.attention(q, k, v, mask)[0]
    k_seen, v_seen = floats(cache)
    lost[name] = np.linalg.norm(out - want) / np.linalg.norm(want)
    for b, h in np.ndindex(B, K):
      s, seen = (x[b, :, h] @ q[b, 0, h] / np.sqrt(H) for x in (k, k_seen))
      d = np.abs(s - seen).max()
      bound = np.expm1(2 * d) * np.abs(v[b, :, h]).max()
      bound += np.abs(v - v_seen)[b, :, h].max() + 1e-5
      assert np.abs(out[b, 0, h] - want[b, 0, h]).max() <= bound
      # And scores by no more than half a step of both stages a channel.
      assert d <= np.abs(q[b, 0, h]) @ half_steps(cache.keys, b, h).max(0) / (
        np.sqrt(H)
      )
  assert lost['4 bits'] < lost['mixed'] < lost['2 bits']


def half_steps(store, b, h):
  """[blocks, H] largest error of each channel of head h."""
  place = np.asarray(store.heads.order).tolist().index(h)
  count = store.high.scale.shape[1]
  group = store.high if place < count else store.low
  at = place if place < count else place - count
  step, scale = np.asarray(group.step)[b, at], np.asarray(group.scale)[b, at]
  return (step.astype(float) + 1) / 2 * 1.001 * scale[:, None]
