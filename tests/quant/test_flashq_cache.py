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
  nbytes,
  prefill,
  read,
  read_recent,
)
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
  return _new_cache(*sample(9, 99, heads), low_heads, room)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _new_cache(k, v, low_heads, room):
  return empty(
    B,
    room,
    keys=flashq.calibrate(k),
    values=flashq.calibrate(v),
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
  both = read_all(store, ids)
  (ints, scale), (recent, recent_scale) = jax.tree.map(np.asarray, both)
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


@jax.jit
def read_all(store, ids):
  """Integers and scale of the blocks, and of what is not packed yet."""
  return read(store, ids), read_recent(store)


@pytest.mark.tier('default')
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


def test_what_lies_behind_a_prompt_may_be_nan():
  """It sets no scale of the block that the prompt ends in."""
  _, fill = jitted()
  lengths, caches = np.asarray([0, 7, 16]), []
  behind = (np.arange(20)[None] >= lengths[:, None])[..., None, None]
  for value in (0.0, np.nan, np.inf):
    arrays = [jnp.where(behind, value, x) for x in sample(1, 20)]
    caches.append(fill(new_cache(), *arrays, jnp.asarray(lengths)))
  for cache in caches[1:]:
    jax.tree.map(np.testing.assert_array_equal, cache, caches[0])


def test_a_block_with_nan_is_nan_and_not_some_integers():
  x = normal(2, BLOCK, H)
  x[1, 3, 2] = np.nan
  _, scale = flashq.stage_one(jnp.asarray(x))
  np.testing.assert_array_equal(np.isnan(scale), [False, True])


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


@pytest.mark.tier('default')
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


@pytest.mark.tier('default')
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
  assert nbytes(jitted()[1](cache, x, x)) == used


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
