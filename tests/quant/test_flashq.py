"""The integers of FlashQ against loops over Python integers."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.quant import flashq

both = pytest.mark.parametrize('bits', [4, 2])


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codes_of(channel, bits):
  """Codes, step and zero of one channel; exact integers."""
  channel = [int(y) for y in channel]
  zero, most = min(channel), 2**bits - 1
  step = max(1, -(-(max(channel) - zero) // most))
  # Rounds half up.
  return [(2 * (y - zero) + step) // (2 * step) for y in channel], step, zero


def restored(block, bits):
  """What comes back of an INT8 block [tokens, H]; also used by the cache."""
  found = np.zeros_like(np.asarray(block), int)
  for c, channel in enumerate(np.asarray(block).T):
    codes, step, zero = codes_of(channel, bits)
    found[:, c] = [step * code + zero for code in codes]
  return found


@pytest.mark.tier('default')
@both
def test_second_stage_equals_the_oracle(bits):
  ints, _ = flashq.stage_one(jnp.asarray(normal(2, 3, 16, 5)))
  packed, step, zero = flashq.stage_two(ints, bits=bits)
  assert packed.dtype == jnp.uint8 and packed.shape == (2, 3, 2 * bits, 5)
  back = flashq.restore(packed, step, zero, bits=bits)
  assert back.dtype == jnp.int8
  tokens = 8 // bits
  for b, h, c in np.ndindex(2, 3, 5):
    codes, one, low = codes_of(np.asarray(ints)[b, h, :, c], bits)
    assert (int(step[b, h, c]), int(zero[b, h, c])) == (one, low)
    count = 16 // tokens
    for i in range(count):
      want = sum(codes[i + j * count] << (bits * j) for j in range(tokens))
      assert int(packed[b, h, i, c]) == want
    np.testing.assert_array_equal(
      back[b, h, :, c], [one * code + low for code in codes]
    )


@pytest.mark.tier('default')
@both
@hypothesis.given(
  st.lists(st.integers(-119, 119), min_size=8, max_size=8),
)
def test_what_comes_back_fits_and_is_half_a_step_off(bits, values):
  y = np.asarray(values, np.int8)[:, None]
  packed, step, zero = flashq.stage_two(jnp.asarray(y), bits=bits)
  back = np.asarray(flashq.restore(packed, step, zero, bits=bits), int)
  # Not taken modulo 256 on the way:
  np.testing.assert_array_equal(back, restored(y, bits))
  assert back.min() >= -119 and back.max() <= 127
  assert (2 * np.abs(back - y) <= np.asarray(step, int)).all()


def test_no_smaller_limit_is_needed_and_no_larger_one_holds():
  """Over all ranges: 119 is the largest limit whose overshoot fits an int8."""

  def worst(limit):
    found = 0
    for low in range(-limit, limit + 1):
      codes, step, zero = codes_of([low, limit], 4)
      found = max(found, step * codes[1] + zero)
    return found

  assert worst(flashq.LIMIT) <= 127
  assert worst(flashq.LIMIT + 2) > 127


@both
def test_the_second_stage_is_integers_only(bits):
  def there_and_back(y):
    return flashq.restore(*flashq.stage_two(y, bits=bits), bits=bits)

  ints, _ = flashq.stage_one(jnp.asarray(normal(8, 3)))
  jaxpr = jax.make_jaxpr(there_and_back)(ints)
  text = str(jaxpr)
  assert 'i32' in text
  assert not any(kind in text for kind in ('f16', 'bf16', 'f32', 'f64'))


@both
def test_packing_is_undone(bits):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 2**bits, size=(3, 8, 5)).astype(np.uint8)
  packed = flashq.pack(jnp.asarray(codes), bits=bits)
  assert packed.size * 8 == codes.size * bits
  np.testing.assert_array_equal(flashq.unpack(packed, bits=bits), codes)


def test_first_stage():
  x = normal(2, 3, 16, 5)
  x[0, 1] = 0
  ints, scale = flashq.stage_one(jnp.asarray(x))
  top = np.abs(np.float64(x)).max((-2, -1))
  np.testing.assert_allclose(scale, np.where(top, top / 119, 1), rtol=1e-6)
  assert np.abs(np.asarray(ints, int)).max() == 119
  error = np.asarray(ints) * np.float64(scale)[..., None, None] - x
  assert (np.abs(error).max((-2, -1)) <= 0.5001 * scale).all()
  beyond = flashq.to_int8(jnp.asarray(x), jnp.full(x.shape, 1e-3))
  assert set(np.unique(beyond)) <= {-119, 0, 119} | set(range(-118, 119))
  assert np.abs(np.asarray(beyond, int)).max() == 119


@pytest.mark.tier('default')
@both
@pytest.mark.parametrize('outliers', [False, True])
def test_the_error_of_a_round_trip(bits, outliers):
  """At most half a step of each stage; with 4 bits as large as theory says."""
  x = normal(4, 64, 128)
  if outliers:
    x[..., :4] *= 8
  ints, scale = flashq.stage_one(jnp.asarray(x))
  packed, step, zero = flashq.stage_two(ints, bits=bits)
  back = np.asarray(flashq.restore(packed, step, zero, bits=bits))
  scale = np.float64(scale)[..., None, None]
  error = np.abs(back * scale - x)
  width = np.asarray(step, float)[..., None, :] * scale
  assert (error <= (width + scale) / 2 * 1.0001).all()
  eight = np.abs(np.asarray(ints) * scale - x)
  assert np.linalg.norm(eight) < np.linalg.norm(error) / 2
  if bits == 4:
    # Even over [-1/2, 1/2], then even over the integers that one code stands
    # for: s of them about 0, or for even s one more above than below it.
    s = np.asarray(step, float)
    even = (1 + np.where(s % 2, s**2 - 1, s**2 + 2)) / 12
    theory = np.sqrt((even[..., None, :] * scale**2).mean())
    assert np.sqrt((error**2).mean()) == pytest.approx(theory, rel=0.05)


def test_fewer_bits_lose_more():
  x = normal(4, 64, 128)
  ints, scale = flashq.stage_one(jnp.asarray(x))
  lost = []
  for bits in (4, 2):
    back = flashq.restore(*flashq.stage_two(ints, bits=bits), bits=bits)
    error = np.asarray(back) * np.float64(scale)[..., None, None] - x
    lost.append(np.linalg.norm(error) / np.linalg.norm(x))
  # 15 steps against 3: five times as wide.
  assert 3.5 < lost[1] / lost[0] < 6.5


def test_heads_are_ranked_by_range_times_spread_of_ranges():
  x = normal(2, 50, 4, 16)
  x[:, :, 2, 3] *= 20  # an outlier channel
  x[:, :, 0] *= 3  # wide, but evenly so
  x[:, :, 1] *= 0.1
  wide = np.float64(x).reshape(100, 4, 16)
  gaps = wide.max(0) - wide.min(0)
  want = (wide.max((0, 2)) - wide.min((0, 2))) * gaps.std(-1)
  np.testing.assert_allclose(flashq.priority(jnp.asarray(x)), want, rtol=1e-5)
  heads = flashq.calibrate(jnp.asarray(x))
  assert heads.order.tolist() == [2, 0, 3, 1]
  top = np.abs(wide).max((0, 2))[[2, 0, 3, 1]]
  np.testing.assert_allclose(heads.scale, top / 119, rtol=1e-6)
