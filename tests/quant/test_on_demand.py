"""Scores from high bits, low bits on demand, against integers in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError
from psa_jax.quant import on_demand_xla
from psa_jax.quant.on_demand import (
  IMPLEMENTATIONS,
  OnDemandConfig,
  attend_split,
  on_demand_attention,
)
from psa_jax.quant.split import join, split, to_integers
from tests import oracles, tiers

B = 2
CONFIG = OnDemandConfig(threshold=0.2)
# name: T, S, N, K, H, Hv, causal, segments, q_offset, config
CASES = {
  'causal': (40, 40, 4, 2, 16, 24, True, False, 0, CONFIG),
  'both ways': (24, 24, 2, 2, 16, 16, False, False, 0, CONFIG),
  'documents': (40, 40, 3, 1, 16, 8, True, True, 0, CONFIG),
  'one query of a cache': (1, 37, 4, 1, 16, 16, True, False, 36, CONFIG),
  'a chunk of a cache': (5, 37, 2, 1, 16, 16, True, False, 20, CONFIG),
  'nothing to read': (5, 20, 2, 1, 16, 16, True, False, -3, CONFIG),
  '4 + 4 bits': (
    *(40, 40, 2, 1, 16, 16, True, False, 0),
    OnDemandConfig(4, 4, 8, 0.3),
  ),
  'products beyond f32': (
    *(24, 24, 2, 1, 16, 16, True, False, 0),
    OnDemandConfig(12, 4, 12, 0.2),
  ),
}
every = pytest.mark.parametrize('name', tiers.cases(CASES, quick=['causal']))


def make_case(name, seed=0):
  T, S, N, K, H, Hv, causal, cut, offset, config = CASES[name]
  rng = np.random.default_rng(seed)
  q, k, v = (
    rng.normal(size=s).astype(np.float32)
    for s in ((B, T, N, H), (B, S, K, H), (B, S, K, Hv))
  )
  q *= rng.choice([0.5, 6], size=(B, T, N, 1))  # flat rows and peaked ones
  k[:, 3], k[0, :, :, 5] = 0, 9 * k[0, :, :, 5]
  segments = None
  if cut:
    segments = np.stack([np.arange(S) >= 13, np.arange(S) >= 30])
    segments = jnp.asarray(segments, jnp.int32)
  mask = oracles.causal_mask(B, K, T, S, q_offset=offset)
  mask[:, :, : max(0, -offset)] = False  # queries before position 0
  mask = mask if causal else np.ones_like(mask)
  if cut:
    same = segments[:, :T, None] == segments[:, None]
    mask &= np.asarray(same)[:, None]
  kw = dict(config=config, causal=causal, q_offset=offset)
  kw |= dict(q_segment_ids=segments, kv_segment_ids=segments)
  return (q, k, v), mask, kw


def oracle(q, k, v, mask, config):
  """Output, which rows ask for more, and bits of keys that each row reads.

  The integers are those of the code (they have a test of their own); all that
  is done with them is done again, in int64 and float64.
  """
  (qi, qs), keys = (
    to_integers(jnp.asarray(q), config.query_bits),
    split(jnp.asarray(k), config),
  )
  qi, qs, high, low, ks = (
    np.asarray(x).astype(t)
    for x, t in zip(
      (qi, qs, *keys), (np.int64, float, np.int64, np.int64, float), strict=True
    )
  )
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  need = np.zeros(q.shape[:3], bool)
  bits = np.zeros(q.shape[:3])
  for b, t, n in np.ndindex(q.shape[:3]):
    g = n // (q.shape[2] // k.shape[2])
    keys = np.flatnonzero(mask[b, g, t])
    if not keys.size:
      continue
    part = 2**config.low_bits
    # Twice the middle of the range is an integer.
    twice = (2 * part * high[b, keys, g] + part - 1) @ qi[b, t, n]
    whole = (part * high[b, keys, g] + low[b, keys, g]) @ qi[b, t, n]
    factor = qs[b, t, n] * ks[b, keys, g] / np.sqrt(q.shape[-1])
    p = probabilities(twice / 2 * factor)
    need[b, t, n] = p.max() < config.threshold
    assert abs(p.max() - config.threshold) > 1e-5, 'a row that may go both ways'
    if need[b, t, n]:
      p = probabilities(whole * factor)
    out[b, t, n] = p @ v[b, keys, g].astype(float)
    used = config.high_bits + need[b, t, n] * config.low_bits
    bits[b, t, n] = keys.size * (used * q.shape[-1] + 32)
  return out, need, bits


def probabilities(s):
  e = np.exp(s - s.max())
  return e / e.sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(keywords, implementation, q, k, v, segments):
  kw = dict(keywords) | dict(q_segment_ids=segments, kv_segment_ids=segments)
  return on_demand_attention(q, k, v, implementation=implementation, **kw)


def attend(args, kw, implementation='xla'):
  segments = kw['q_segment_ids']
  plain = {k: v for k, v in kw.items() if not k.endswith('ids')}
  args = [jnp.asarray(x) for x in args]
  return call(tuple(plain.items()), implementation, *args, segments)


@every
@pytest.mark.parametrize('implementation', list(IMPLEMENTATIONS))
def test_output_and_statistics_equal_the_oracle(name, implementation):
  args, mask, kw = make_case(name)
  want, need, bits = oracle(*args, mask, kw['config'])
  out, stats = attend(args, kw, implementation)
  oracles.check_close(out, want)
  assert stats.refetch_rate == pytest.approx(need.mean())
  assert stats.key_bytes == pytest.approx(bits.mean() / 8, rel=1e-6)
  width, seen = args[0].shape[-1], mask.sum(-1).mean()
  assert stats.key_bytes_f32 == pytest.approx(4 * width * seen, rel=1e-6)
  config = kw['config']
  each = config.high_bits + config.low_bits * need.mean() + 32 / width
  assert stats.key_bits == pytest.approx(each, rel=1e-6)
  if name not in ('one query of a cache', 'nothing to read'):
    assert 0 < need.mean() < 1, 'both kinds of row are there'


@pytest.mark.tier('default')
@pytest.mark.parametrize('threshold', [0.0, 0.2, 2.0])
def test_tiles_that_no_row_fills_are_not_computed(threshold, monkeypatch):
  """Counts the tiles of the second pass when they run."""
  monkeypatch.setattr(on_demand_xla, 'ROWS', 8)
  monkeypatch.setattr(on_demand_xla, 'KEYS', 64)
  seen, plain = [], on_demand_xla.scores

  def counted(q, q_scale, high, low, k_scale, *, config):
    jax.debug.callback(seen.append, low is not None)
    return plain(q, q_scale, high, low, k_scale, config=config)

  monkeypatch.setattr(on_demand_xla, 'scores', counted)
  args, mask, _ = make_case('causal')
  config = OnDemandConfig(threshold=threshold)
  _, need, _ = oracle(*args, mask, config)
  args = [jnp.asarray(x) for x in args]
  on_demand_attention(*args, config=config)[0].block_until_ready()
  jax.effects_barrier()
  by_head = need.reshape(B, 40, 2, 2).sum((1, 3))
  assert seen.count(True) == np.ceil(by_head / 8).sum()
  assert seen.count(False) == B * 2 * 10
  if threshold == 0.2:
    assert 0 < seen.count(True) < seen.count(False)


@pytest.mark.parametrize('high, low', [(2, 8), (6, 4), (8, 4), (12, 4)])
def test_the_parts_of_a_key(high, low):
  config = OnDemandConfig(high_bits=high, low_bits=low)
  k = np.random.default_rng(1).normal(size=(B, 9, 2, 16)).astype(np.float32)
  k[0, 0] = 0
  keys = split(jnp.asarray(k), config)
  highs, lows = (np.asarray(x, np.int64) for x in keys[:2])
  assert -(2 ** (high - 1)) <= highs.min() < 0 < highs.max() < 2 ** (high - 1)
  assert 0 <= lows.min() and lows.max() < 2**low
  whole = highs * 2**low + lows
  most = 2 ** (high + low - 1) - 1
  assert np.abs(whole).max() == most
  scale = np.abs(np.float64(k)).max(-1) / most
  np.testing.assert_allclose(keys.scale, np.where(scale, scale, 1), rtol=1e-6)
  error = np.abs(whole * np.float64(keys.scale)[..., None] - k)
  assert (
    error <= np.float64(keys.scale)[..., None] * 0.5001 + most * 1e-9
  ).all()
  np.testing.assert_allclose(
    join(keys, config), whole * np.float64(keys.scale)[..., None], rtol=1e-6
  )


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  ('bits', 'threshold'), [(4, 0.0), (6, 0.0), (6, 2.0), (8, 2.0)]
)
def test_the_error_of_the_output_is_bounded(bits, threshold):
  """From half a step a channel to scores, and from scores to the output.

  If no score moves by more than d, no probability changes by a factor beyond
  exp(2 d), so the output moves by at most (exp(2 d) - 1) max|v|.
  """
  config = OnDemandConfig(bits, 4, 12, threshold)
  args, mask, kw = make_case('causal')
  q, k, v = args
  got = attend(args, kw | dict(config=config))[0]
  (_, q_scale), keys = (
    to_integers(jnp.asarray(q), 12),
    split(jnp.asarray(k), config),
  )
  q_error = np.asarray(q_scale, float)[..., None] / 2
  lost = 1 / 2 if threshold else (2**4 - 1) / 2 + 1 / 2
  k_error = np.asarray(keys.scale, float)[..., None] * lost
  want = oracles.attention(q, k, v, mask)[0]
  for b, t, n in np.ndindex(q.shape[:3]):
    g, seen = n // 2, slice(t + 1)
    moved = np.abs(q[b, t, n]) @ np.broadcast_to(k_error, k.shape)[b, seen, g].T
    size = np.abs(k) + k_error
    moved = moved + (q_error[b, t, n] * size[b, seen, g]).sum(-1)
    d = 1.001 * moved.max() / np.sqrt(q.shape[-1])
    bound = np.expm1(2 * d) * np.abs(v[b, seen, g]).max() + 1e-5
    assert np.abs(got[b, t, n] - want[b, t, n]).max() <= bound
  if threshold and bits == 8:
    oracles.check_close(got, want, 'bfloat16')


@pytest.mark.tier('default')
def test_a_cache_of_split_keys_gives_the_same_at_a_traced_position():
  (q, k, v), _, kw = make_case('one query of a cache')
  keys, traces = split(jnp.asarray(k), CONFIG), []

  @jax.jit
  def decode(q, offset, v):
    traces.append(1)
    return attend_split(q, keys, v, config=CONFIG, q_offset=offset)

  v = jnp.asarray(v)
  for offset in (36, 20, 0):
    got, got_stats = decode(jnp.asarray(q), offset, v)
    behind = np.arange(v.shape[1]) > offset  # holds nothing yet
    filled = jnp.where(behind[None, :, None, None], np.nan, v)
    again, _ = decode(jnp.asarray(q), offset, filled)
    np.testing.assert_array_equal(again, got)
    want, stats = attend((q, k, v), kw | dict(q_offset=offset))
    oracles.check_close(got, want)
    assert got_stats.key_bytes == stats.key_bytes
  assert len(traces) == 1


@pytest.mark.tier('default')
@pytest.mark.parametrize('name', ['documents', 'a chunk of a cache'])
def test_the_gradient_is_that_of_dense_attention_at_what_was_read(name):
  (q, k, v), mask, kw = make_case(name)
  config = kw['config']
  d_out = np.random.default_rng(2).normal(size=(*q.shape[:3], v.shape[-1]))
  args = [jnp.asarray(x) for x in (q, k, v)]

  def loss(*args):
    return (on_demand_attention(*args, **kw)[0] * d_out).sum()

  got = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
  qi, q_scale = to_integers(args[0], config.query_bits)
  q_seen = np.asarray(qi) * np.float64(q_scale)[..., None]
  k_seen = np.asarray(join(split(args[1], config), config))
  zero = np.zeros(q.shape[:3])
  want = oracles.attention_grads(q_seen, k_seen, v, mask, d_out, zero)
  for one, other in zip(got, want, strict=True):
    oracles.check_close(one, other, gradient=True)


@pytest.mark.tier('default')
def test_half_precision_in_and_out():
  args, mask, kw = make_case('causal')
  low = [jnp.asarray(x, jnp.bfloat16) for x in args]
  out, _ = attend(low, kw)
  assert out.dtype == jnp.bfloat16
  same = [np.asarray(x, np.float32) for x in low]
  oracles.check_close(out, oracle(*same, mask, kw['config'])[0], 'bfloat16')

  def loss(*args):
    return on_demand_attention(*args, **kw)[0].astype(jnp.float32).sum()

  grads = jax.eval_shape(jax.grad(loss, (0, 1, 2)), *low)
  assert {g.dtype.name for g in grads} == {'bfloat16'}


def test_what_cannot_be_is_refused():
  args, _, kw = make_case('causal')
  with pytest.raises(ConfigError, match="'pallas_tpu'.*'xla'"):
    attend(args, kw, 'pallas_tpu')
  wide = jnp.zeros((1, 1, 1, 1024))
  big = OnDemandConfig(12, 4, 12)
  with pytest.raises(ValueError, match='width 1024 .* leave int32'):
    on_demand_attention(wide, wide, wide, config=big)
