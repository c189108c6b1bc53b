"""What hybrid chooses, against the specification written as loops."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import attend as library_attend
from psa_jax.attention import hybrid as module
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.hybrid import HybridConfig
from psa_jax.config import AttentionConfig, ConfigError, ScheduleConfig
from psa_jax.kernels import block_scores
from psa_jax.kernels.decode import decode_attention
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, T, N, K, H, HV = 2, 100, 4, 2, 8, 12


def settings(cap=0.25, **kw):
  cfg = dict(block_q=16, block_k=8, window=12, min_blocks=1)
  cfg |= dict(keep=ScheduleConfig(init=cap, final=cap))
  return HybridConfig(**cfg | kw)


def arrays(t=T, seed=0, scale=2):
  rng = np.random.default_rng(seed)
  shapes = (B, t, N, H), (B, t, K, H), (B, t, K, HV)
  return tuple(
    jnp.asarray(rng.normal(size=s) * c, jnp.float32)
    for s, c in zip(shapes, (scale, 1, 1), strict=True)
  )


def documents():
  starts = np.stack([np.isin(np.arange(T), (37, 80)), np.arange(T) == 51])
  return jnp.asarray(1 + np.cumsum(starts, 1).astype(np.int32))


def entropies(q, k, cfg, segments=None):
  """{(b, kv head, tile): entropy of each head's block distribution}.

  Over the blocks that lie wholly at or before the tile's first query, each
  with mass `size * exp(q . mean)`.
  """
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  seg = np.zeros(q.shape[:2], int) if segments is None else np.asarray(segments)
  found, group = {}, q.shape[2] // k.shape[2]
  for b, h, i in np.ndindex(B, k.shape[2], -(-q.shape[1] // cfg.block_q)):
    t0 = i * cfg.block_q
    begin = int(np.flatnonzero(seg[b] == seg[b, t0])[0]) // cfg.block_k
    heads = []
    for g in range(group):
      mass = []
      for j in range(begin, (t0 + 1) // cfg.block_k):
        at = np.arange(j * cfg.block_k, (j + 1) * cfg.block_k)
        at = at[seg[b, at] == seg[b, at[-1]]]
        x = q[b, t0, h * group + g] @ k[b, at, h].mean(0) * H**-0.5
        mass.append(len(at) * math.exp(x))
      p = np.array(mass) / sum(mass) if mass else np.ones(1)
      heads.append(-(p * np.log(p)).sum())
    found[b, h, i] = heads
  return found


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize(
  'cfg',
  [
    settings(coefficient=0.3),
    settings(0.5, coefficient=0.8, sink_blocks=1),
    settings(0.4, block_q=8, block_k=16, coefficient=0.5),
    settings(0.6, block_q=1, window=20, min_blocks=3, coefficient=0.8),
    settings(0.4, scoring='bounds', coefficient=0.6),
    settings(0.6, min_blocks=3, coefficient=0.1),  # asks for one
  ],
)
def test_selection_is_the_definition(cfg, cut):
  q, k, _ = arrays()
  seg = documents() if cut else None
  cfg = dataclasses.replace(cfg, max_blocks=T)
  cap = cfg.keep.init
  got, spread = jax.jit(
    lambda q, k: module.select_blocks(q, k, cfg, cap=cap, segment_ids=seg)
  )(q, k)
  ranked = oracles.psa_selection(
    q,
    k,
    block_q=cfg.block_q,
    block_k=cfg.block_k,
    window=cfg.window,
    sink=cfg.sink_blocks,
    keep=1.0,
    bounds=cfg.scoring == 'bounds',
    segments=None if seg is None else np.asarray(seg),
  )
  entropy = entropies(q, k, cfg, seg)
  reasons = set()
  for key, (forced, order, _, visible) in ranked.items():
    b, h, i = key
    # A tile that the sequence's end cuts counts as a whole one.
    last = min((i + 1) * cfg.block_q, T) - 1
    whole = ((i + 1) * cfg.block_q - 1) // cfg.block_k - last // cfg.block_k
    most = math.floor(cap * (visible + whole) + 1e-9)
    asked = math.ceil(cfg.coefficient * math.exp(max(entropy[key])) - 1e-3)
    wanted = max(asked, cfg.min_blocks)
    extra = min(wanted, most, len(order))
    ids = np.asarray(got.ids[b, h, i])[: got.counts[b, h, i]].tolist()
    assert len(ids) == len(forced) + extra, key
    assert set(ids[: len(forced)]) == forced
    assert ids[len(forced) :] == order[:extra]
    assert got.visible[b, h, i] == visible
    assert spread.capped[b, h, i] == (asked > most and len(order) > most)
    np.testing.assert_allclose(
      spread.entropy[b, h, i], np.mean(entropy[key]), 1e-4, 1e-5
    )
    np.testing.assert_allclose(
      spread.support[b, h, i], math.exp(max(entropy[key])), 1e-4
    )
    reasons.add('cap' if wanted > most else 'rule')
  assert len(reasons) == 2, 'cap and rule must both decide somewhere'


def test_peaked_rows_read_little_and_flat_rows_up_to_the_cap():
  """Zero queries spread evenly over all n blocks: exp(H) is n exactly."""
  q, k, _ = arrays()
  cfg = settings(0.5, block_q=8)
  flat, spread = module.select_blocks(0 * q, k, cfg, cap=0.5)
  scored = (np.arange(13) * 8 + 1) // 8
  np.testing.assert_allclose(
    spread.support[0, 0], np.maximum(scored, 1), rtol=1e-5
  )
  # One block holds the whole mass of a query that points at its mean.
  peaked_k = k.at[:, 8:16].add(50.0)
  ones = jnp.ones_like(q)
  peaked, spread = module.select_blocks(ones, peaked_k, cfg, cap=0.5)
  np.testing.assert_allclose(spread.support[..., 3:], 1, rtol=1e-5)
  assert (peaked.counts[..., -1] < flat.counts[..., -1]).all()
  forced = 3  # the tile's own block, and two of the window
  assert (peaked.counts[..., 5:] == forced + 1).all()
  assert (flat.counts[0, 0, 5:] == forced + np.arange(6, 14) // 2).all()


def test_at_most_the_cap_beside_the_window():
  """However flat, and whatever `min_blocks` says: at most 25 %."""
  q, k, _ = arrays(scale=0.1)
  for minimum in (1, 50):
    cfg = settings(min_blocks=minimum, coefficient=10.0)
    lists, _ = module.select_blocks(q, k, cfg, cap=0.25)
    window, _ = module.select_blocks(q, k, cfg, cap=1e-6)
    extra = lists.counts - window.counts
    whole = np.array([[[2, 4, 6, 8, 10, 12, 14]]])  # of an uncut tile
    assert (extra <= 0.25 * whole).all() and (extra > 0).any()


def test_the_window_reaches_every_query():
  q, k, _ = arrays()
  for window in (1, 8, 12, 50):
    cfg = settings(1e-6, window=window)
    got, _ = module.select_blocks(q, k, cfg, cap=1e-6)
    mask = oracles.list_mask(
      np.asarray(got.ids), np.asarray(got.counts), T, T, 16, 8
    )
    for t in range(T):
      assert mask[:, :, t, max(0, t - window + 1) : t + 1].all()


def test_density_falls_smoothly_from_dense_to_the_rule():
  q, k, _ = arrays(scale=3)
  keep = ScheduleConfig(kind='linear', init=1.0, final=0.25, begin=1, length=10)
  cfg = settings(keep=keep, block_q=4, coefficient=0.3)
  config = AttentionConfig(name='hybrid', hybrid=cfg)
  traces = []

  @jax.jit
  def density(step):
    traces.append(1)
    return module.hybrid(
      q, k, k, config=config, context=AttentionContext(step=step)
    ).aux['density']

  seen = [float(density(jnp.int32(i))) for i in range(13)]
  assert len(traces) == 1 and seen[0] == seen[1] == 1
  assert all(a >= b for a, b in zip(seen, seen[1:], strict=False))
  assert max(a - b for a, b in zip(seen, seen[1:], strict=False)) < 0.15
  final = AttentionConfig(
    name='hybrid',
    hybrid=dataclasses.replace(cfg, keep=ScheduleConfig(init=0.25, final=0.25)),
  )
  alone = module.hybrid(
    q, k, k, config=final, context=AttentionContext(step=0)
  ).aux['density']
  assert seen[11] == seen[12] == pytest.approx(float(alone), abs=1e-6)


def test_evaluation_may_have_its_own_cap():
  cfg = settings(0.9, eval_keep=0.2)
  assert module.cap_at(cfg, 0, True) == jnp.float32(0.9)
  assert module.cap_at(cfg, 0, False) == jnp.float32(0.2)
  assert module.cap_at(settings(0.9), 0, False) == jnp.float32(0.9)


def test_list_width():
  keep = ScheduleConfig(kind='linear', init=0.5, final=0.1, length=9)
  assert module.list_width(settings(keep=keep), 1000) == 506
  assert module.list_width(settings(keep=keep, eval_keep=0.7), 1000) == 706
  assert module.list_width(settings(keep=keep, max_blocks=20), 1000) == 20
  assert module.list_width(settings(), 10) == 8
  assert module.list_width(settings(1.0), 10) == 10
  with pytest.raises(ConfigError, match='max_blocks=3 is less than the 5'):
    module.list_width(settings(max_blocks=3), 1000)


def test_the_automatic_width_drops_nothing():
  q, k, _ = arrays(scale=0.1)
  for cap, block_q, block_k in ((0.25, 16, 8), (0.5, 8, 16), (1.0, 24, 16)):
    cfg = settings(cap, block_q=block_q, block_k=block_k, coefficient=10.0)
    wide = dataclasses.replace(cfg, max_blocks=T)
    got, _ = module.select_blocks(q, k, cfg, cap=cap)
    want, _ = module.select_blocks(q, k, wide, cap=cap)
    np.testing.assert_array_equal(got.counts, want.counts)


def test_a_bidirectional_model_is_refused():
  config = AttentionConfig(name='hybrid', hybrid=settings())
  with pytest.raises(ConfigError, match='hybrid is causal'):
    library_attend(
      *arrays(), config=config, context=AttentionContext(causal=False)
    )


SETTINGS = {
  'cap': settings(0.25, coefficient=9.0),
  'entropy': settings(0.9, coefficient=0.3, block_q=4),
  'per token': settings(0.5, block_q=1, block_k=4),
  'tile across blocks': settings(0.5, block_q=12, block_k=8, window=3),
  'short lists': settings(0.9, max_blocks=6),
}


@functools.partial(jax.jit, static_argnames='cfg')
def decode_step(state, q, k, v, starts, cfg):
  """One more token for every row; the cache is two arrays and summaries."""
  keys, values, pooled, lists, at = state
  keys = keys.at[:, at].set(k[:, 0])
  values = values.at[:, at].set(v[:, 0])
  lengths = jnp.full((B,), at, jnp.int32)
  pooled = block_scores.append(
    pooled, k, lengths, block_k=cfg.block_k, starts=starts[:, None]
  )
  lists = module.next_blocks(
    lists,
    q,
    pooled,
    cfg,
    lengths=lengths + 1,
    cap=module.cap_at(cfg, 0, False),
    starts=starts,
  )
  out, _ = decode_attention(
    q,
    keys,
    values,
    lists.ids[:, :, 0],
    lists.counts[:, :, 0],
    lengths + 1,
    block_k=cfg.block_k,
    starts=starts,
  )
  return out, (keys, values, pooled, lists, at + 1)


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('name', list(SETTINGS))
def test_decode_is_prefill_token_by_token(name, cut):
  cfg, t, room = SETTINGS[name], 50, 72
  q, k, v = arrays(t)
  begins = np.zeros((B, t), bool)
  if cut:
    begins[0, [21, 40]] = begins[1, 35] = True
  starts = np.maximum.accumulate(np.where(begins, np.arange(t), 0), 1)
  seg = jnp.asarray(np.cumsum(begins, 1), jnp.int32) if cut else None
  config = AttentionConfig(name='hybrid', hybrid=cfg)
  want = module.hybrid(
    q, k, v, config=config, context=AttentionContext(step=0, segment_ids=seg)
  )
  width = module.list_width(cfg, -(-room // cfg.block_k))
  state = (
    jnp.zeros((B, room, K, H)),
    jnp.zeros((B, room, K, HV)),
    block_scores.empty(
      B, room, K, H, block_k=cfg.block_k, bounds=cfg.scoring == 'bounds'
    ),
    module.BlockList(
      jnp.zeros((B, K, 1, width), jnp.int32),
      *[jnp.zeros((B, K, 1), jnp.int32)] * 2,
    ),
    jnp.int32(0),
  )
  outs = []
  for i in range(t):
    row = (x[:, i : i + 1] for x in (q, k, v))
    out, state = decode_step(state, *row, jnp.asarray(starts[:, i]), cfg=cfg)
    outs.append(np.asarray(out))
  oracles.check_close(np.concatenate(outs, 1), want.out)
  assert cut or float(want.aux['density']) < 1
