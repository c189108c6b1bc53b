"""The packed cache against a list of tokens, and attention against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.quant import flashq, flashq_cache
from psa_jax.quant.flashq_cache import (
  append,
  empty,
  flashq_attention,
  nbytes,
  prefill,
  read,
  read_recent,
)
from tests import oracles
from tests.quant.test_flashq import restored

B, K, H, HV, BLOCK, ROOM = 3, 3, 6, 10, 8, 32


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sample(seed=0, length=24, heads=K):
  """Keys and values whose heads differ, in another order each."""
  k = normal(B, length, heads, H, seed=seed)
  v = normal(B, length, heads, HV, seed=seed + 100)
  k[..., 0] *= np.arange(1, 1 + heads, dtype=np.float32)
  v[..., 0] *= np.roll(np.arange(1, 1 + heads, dtype=np.float32), 1)
  return k, v


def new_cache(low_heads=1, room=ROOM, heads=K):
  keys, values = (
    flashq.calibrate(jnp.asarray(x)) for x in sample(9, 99, heads)
  )
  return empty(
    B,
    room,
    keys=keys,
    values=values,
    head_dim=H,
    value_dim=HV,
    low_heads=low_heads,
    block=BLOCK,
  )


class Oracle:
  """One of keys or values as INT8 tokens with their scales, row by row."""

  def __init__(self, store, low_heads):
    order = np.asarray(store.heads.order)
    self.bits = dict.fromkeys(order[: K - low_heads].tolist(), 4)
    self.bits |= dict.fromkeys(order[K - low_heads :].tolist(), 2)
    self.buffer_scale = np.zeros(K, np.float32)
    self.buffer_scale[order] = store.heads.scale
    self.rows = [[[] for _ in range(K)] for _ in range(B)]

  def add(self, b, x):
    """One token x [K, width] at the buffer's scales."""
    for h in range(K):
      s = self.buffer_scale[h]
      y = np.clip(np.rint(x[h] / s), -119, 119).astype(int)
      self.rows[b][h].append((y, s))

  def fill(self, b, x):
    """A prompt x [T, K, width]."""
    whole = len(x) // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
      for h in range(K):
        part = x[begin : begin + BLOCK, h]
        s = np.float32(np.abs(part).max() / np.float32(119))
        for token in part:
          y = np.rint(token / s).astype(int)
          self.rows[b][h].append((y, s))
    for token in x[whole:]:
      self.add(b, token)

  def ints(self, b, h):
    """[T, width] after packing: whole blocks come back changed."""
    y = np.stack([y for y, _ in self.rows[b][h]])
    for begin in range(0, len(y) // BLOCK * BLOCK, BLOCK):
      part = slice(begin, begin + BLOCK)
      y[part] = restored(y[part], self.bits[h])
    return y

  def scales(self, b, h):
    return np.asarray([s for _, s in self.rows[b][h]], np.float64)


def check(store, oracle, lengths):
  """Every token of the store is the oracle's, integer for integer."""
  blocks = ROOM // BLOCK
  ids = jnp.broadcast_to(jnp.arange(blocks)[None, None], (B, K, blocks))
  ints, scale = (np.asarray(x) for x in read(store, ids))
  recent, recent_scale = (np.asarray(x) for x in read_recent(store))
  for b, h in np.ndindex(B, K):
    T = lengths[b]
    assert T == len(oracle.rows[b][h])
    if not T:
      continue
    want, scales, whole = oracle.ints(b, h), oracle.scales(b, h), T // BLOCK
    got = ints[b, h].reshape(ROOM, -1)[: whole * BLOCK]
    np.testing.assert_array_equal(got, want[: whole * BLOCK])
    got = np.repeat(scale[b, h, :whole], BLOCK)
    np.testing.assert_allclose(got, scales[: whole * BLOCK], rtol=1e-6)
    left = T - whole * BLOCK
    np.testing.assert_array_equal(recent[b, h, :left], want[whole * BLOCK :])
    if left:
      assert recent_scale[b, h] == pytest.approx(scales[-1])


@functools.cache
def jitted():
  return jax.jit(append), jax.jit(prefill)


@pytest.mark.parametrize('low_heads', [0, 1, 3])
def test_ragged_appends_equal_a_list_of_tokens(low_heads):
  """Rows that begin with prompts of other lengths and grow by other amounts."""
  add, fill = jitted()
  cache = new_cache(low_heads)
  oracles_ = [Oracle(s, low_heads) for s in (cache.keys, cache.values)]
  lengths = np.asarray([0, 7, 16])
  arrays = sample(1, 20)
  cache = fill(cache, *map(jnp.asarray, arrays), jnp.asarray(lengths))
  for oracle, x in zip(oracles_, arrays, strict=True):
    for b in range(B):
      oracle.fill(b, x[b, : lengths[b]])
  for i, counts in enumerate([(1, 1, 1), (5, 0, 3), (5, 5, 5), (4, 3, 0)]):
    arrays = sample(10 + i, 5)
    arrays[0][0, 0] *= 10  # beyond the buffer's scale: clamped
    cache = add(cache, *map(jnp.asarray, arrays), jnp.asarray(counts))
    for oracle, x in zip(oracles_, arrays, strict=True):
      for b in range(B):
        for token in x[b, : counts[b]]:
          oracle.add(b, token)
    lengths = lengths + counts
    np.testing.assert_array_equal(cache.lengths, lengths)
    for store, oracle in zip((cache.keys, cache.values), oracles_, strict=True):
      check(store, oracle, lengths)
  assert lengths.max() > 3 * BLOCK - 1 and len(set(lengths % BLOCK)) > 1


def test_a_full_row_drops_what_comes():
  add, fill = jitted()
  arrays = [jnp.asarray(x) for x in sample(1, ROOM)]
  cache = fill(new_cache(), *arrays, jnp.asarray([ROOM, ROOM - 1, 3]))
  more = [jnp.asarray(x) for x in sample(2, 5)]
  after = add(cache, *more, jnp.asarray([5, 5, 5]))
  assert after.lengths.tolist() == [ROOM, ROOM, 8]
  ids = jnp.broadcast_to(jnp.arange(4)[None, None], (B, K, 4))
  np.testing.assert_array_equal(
    read(after.keys, ids)[0][0], read(cache.keys, ids)[0][0]
  )


def test_one_compilation_whichever_heads_are_low():
  traces = []

  @jax.jit
  def step(cache, k, v):
    traces.append(1)
    return append(cache, k, v)

  cache, arrays = new_cache(), [jnp.asarray(x) for x in sample(1, 1)]
  for order in ([0, 1, 2], [2, 0, 1]):
    heads = cache.keys.heads._replace(order=jnp.asarray(order, jnp.int32))
    mixed = cache._replace(keys=cache.keys._replace(heads=heads))
    for _ in range(BLOCK + 1):
      mixed = step(mixed, *arrays)
    ids = jnp.zeros((B, K, 1), jnp.int32)
    wide = [len(np.unique(read(mixed.keys, ids)[0][:, h])) for h in range(K)]
    assert mixed.lengths.tolist() == [BLOCK + 1] * B
    assert min(wide) > 1
  assert len(traces) == 1


@pytest.mark.parametrize(('width', 'room'), [(64, 4096), (128, 4096)])
def test_bytes_of_the_buffers_against_fp16(width, room):
  """Half of the heads in 2 bits; scales, zeros, tables and buffer included."""
  heads = flashq.Heads(jnp.arange(4, dtype=jnp.int32), jnp.ones(4))
  cache = empty(1, room, keys=heads, values=heads, head_dim=width, low_heads=2)
  fp16 = 2 * room * 4 * width * np.dtype(np.float16).itemsize
  used = nbytes(cache)
  by_hand = 2 * 4 * room * width * 3 / 8  # codes
  by_hand += 2 * 4 * (room // 64) * (2 * width + 4)  # step, zero, scale
  by_hand += 2 * (4 * 64 * width + 4 * 8) + 4  # buffers, heads, length
  assert used == by_hand
  assert fp16 / used >= 4.4
  x = jnp.asarray(normal(1, room, 4, width))
  assert nbytes(prefill(cache, x, x)) == used


# Attention.


def filled(lengths, low_heads=1, heads=K, seed=1):
  arrays = sample(seed, ROOM, heads)
  cache = new_cache(low_heads, heads=heads)
  return prefill(cache, *map(jnp.asarray, arrays), jnp.asarray(lengths)), arrays


def floats(cache):
  """Float64 keys and values [B, ROOM, K, width] of everything in the cache."""
  found = []
  for store in (cache.keys, cache.values):
    ids = jnp.broadcast_to(jnp.arange(ROOM // BLOCK)[None, None], (B, K, 4))
    ints, scale = (np.asarray(x) for x in read(store, ids))
    recent, recent_scale = (np.asarray(x) for x in read_recent(store))
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


@pytest.mark.parametrize('T', [1, 3])
@pytest.mark.parametrize('group', [1, 3])
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


def test_sizes_that_do_not_fit_are_refused():
  heads = flashq.Heads(jnp.arange(2, dtype=jnp.int32), jnp.ones(2))
  three = flashq.Heads(jnp.arange(3, dtype=jnp.int32), jnp.ones(3))
  kw = dict(keys=heads, values=heads, head_dim=4, low_heads=1)
  with pytest.raises(
    ValueError, match='room=100 must be a multiple of block=64'
  ):
    empty(1, 100, **kw)
  with pytest.raises(ValueError, match='block=6'):
    empty(1, 12, block=6, **kw)
  with pytest.raises(ValueError, match='low_heads=3'):
    empty(1, 64, **kw | dict(low_heads=3))
  with pytest.raises(ValueError, match='keys have 2 heads, values 3'):
    empty(1, 64, **kw | dict(values=three))
  with pytest.raises(ValueError, match='does not fit room 64'):
    flashq_cache.prefill(
      empty(1, 64, **kw), jnp.ones((1, 65, 2, 4)), jnp.ones((1, 65, 2, 4))
    )
