"""What psa chooses, against the specification written as loops."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import block_lists as blocks_lib
from psa_jax.attention import psa as module
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig, ConfigError, ScheduleConfig
from psa_jax.kernels.block_scores import xla as block_scores_xla
from psa_jax.kernels.block_sparse import block_sparse_attention
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, T, N, K, H = 2, 100, 4, 2, 8


def settings(**kw):
  base = dict(block_q=16, block_k=8, window=12, sink_blocks=1)
  return PsaConfig(**base | kw)


def arrays(seed=0, t=T):
  rng = np.random.default_rng(seed)
  q = jnp.asarray(2 * rng.normal(size=(B, t, N, H)), jnp.float32)
  k = jnp.asarray(rng.normal(size=(B, t, K, H)), jnp.float32)
  return q, k


def documents():
  starts = np.stack([np.isin(np.arange(T), (37, 80)), np.arange(T) == 51])
  return jnp.asarray(1 + np.cumsum(starts, 1).astype(np.int32))


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('tiles_at_once', [2, 64])
@pytest.mark.parametrize(
  'config, budget',
  [
    (settings(), 0.4),
    (settings(sink_blocks=0, window=1), 0.3),
    (settings(block_q=8, block_k=16), 0.5),
    (settings(block_q=1, window=20, sink_blocks=2), 0.6),
    (settings(budget='mass'), 0.7),
    (settings(budget='mass', scoring='bounds'), 1e-3),
    (settings(scoring='bounds'), 0.4),
    (settings(), 1.0),
    (settings(), 1e-6),
  ],
)
def test_selection_is_the_definition(
  config, budget, tiles_at_once, cut, monkeypatch
):
  monkeypatch.setattr(block_scores_xla, 'TILES_AT_ONCE', tiles_at_once)
  q, k = arrays()
  seg = documents() if cut else None
  config = dataclasses.replace(config, max_blocks=T)
  got = jax.jit(
    lambda q, k: module.select_blocks(
      q, k, config, budget=budget, segment_ids=seg
    )
  )(q, k)
  want = oracles.psa_selection(
    q,
    k,
    block_q=config.block_q,
    block_k=config.block_k,
    window=config.window,
    sink=config.sink_blocks,
    keep=budget if config.budget == 'ratio' else None,
    mass=budget if config.budget == 'mass' else None,
    bounds=config.scoring == 'bounds',
    segments=None if seg is None else np.asarray(seg),
  )
  sparse = 0
  for (b, h, i), (forced, ranked, count, visible) in want.items():
    ids = np.asarray(got.ids[b, h, i])[: got.counts[b, h, i]].tolist()
    assert got.visible[b, h, i] == visible
    assert len(ids) == count, (b, h, i)
    assert len(set(ids)) == len(ids)
    assert set(ids[: len(forced)]) == forced
    assert ids[len(forced) :] == ranked[: count - len(forced)]
    sparse += count < visible
  assert sparse > 0 or budget == 1


@hypothesis.given(
  seed=st.integers(0, 2**31), mass=st.floats(0.01, 0.999), t=st.integers(2, 60)
)
@hypothesis.settings(max_examples=15)
def test_bounds_guarantee_the_mass_and_the_error(seed, mass, t):
  """Per query: kept mass >= epsilon and |o' - o| <= 2 (1 - epsilon) max|v|."""
  rng = np.random.default_rng(seed)
  scale = rng.choice([0.1, 1.0, 5.0])
  q = jnp.asarray(scale * rng.normal(size=(1, 60, 2, 4)), jnp.float32)
  k = jnp.asarray(rng.normal(size=(1, 60, 1, 4)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(1, 60, 1, 4)), jnp.float32)
  out, counts, ids = _bounded(q, k, v, mass)
  read = oracles.list_mask(np.asarray(ids), np.asarray(counts), 60, 60, 1, 4)
  dense = oracles.causal_mask(1, 1, 60, 60)
  exact, full = oracles.attention(q, k, v, dense)
  _, kept = oracles.attention(q, k, v, dense & read)
  assert (np.exp(kept - full) >= mass - 1e-5).all()
  error = np.linalg.norm(np.asarray(out) - exact, axis=-1)
  largest = np.linalg.norm(np.asarray(v)[:, : t + 1], axis=-1).max()
  assert error[:, t].max() <= 2 * (1 - mass) * largest + 1e-5


@jax.jit
def _bounded(q, k, v, mass):
  config = settings(
    block_q=1, block_k=4, window=1, budget='mass', scoring='bounds'
  )
  blocks = module.select_blocks(q, k, config, budget=mass)
  out, _ = block_sparse_attention(
    q, k, v, blocks.ids, blocks.counts, block_q=1, block_k=4
  )
  return out, blocks.counts, blocks.ids


@pytest.mark.parametrize('budget', ['ratio', 'mass'])
def test_more_budget_reads_a_superset(budget):
  q, k = arrays()
  config = settings(budget=budget, max_blocks=T)
  previous = None
  for value in (0.0, 0.2, 0.5, 0.9, 1.0):
    got = module.select_blocks(q, k, config, budget=jnp.float32(value))
    mask = oracles.list_mask(
      np.asarray(got.ids), np.asarray(got.counts), T, T, 16, 8
    )
    assert previous is None or (mask >= previous).all()
    previous = mask
  assert (previous >= oracles.causal_mask(B, K, T, T)).all()


def test_the_window_reaches_every_query():
  """At the smallest budget each query still reads its last `window` keys."""
  q, k = arrays()
  for window in (1, 8, 12, 50):
    got = module.select_blocks(q, k, settings(window=window), budget=0.0)
    mask = oracles.list_mask(
      np.asarray(got.ids), np.asarray(got.counts), T, T, 16, 8
    )
    for t in range(T):
      assert mask[:, :, t, max(0, t - window + 1) : t + 1].all()
      assert mask[:, :, t, :8].all()


def test_retained_mass_is_the_exact_share():
  q, k = arrays()
  v = k
  config = AttentionConfig(
    name='psa', psa=settings(keep=ScheduleConfig(init=0.4, final=0.4))
  )
  _, aux = module.psa(q, k, v, config=config, context=AttentionContext(step=0))
  blocks = module.select_blocks(q, k, config.psa, budget=0.4)
  read = oracles.list_mask(
    np.asarray(blocks.ids), np.asarray(blocks.counts), T, T, 16, 8
  )
  dense = oracles.causal_mask(B, K, T, T)
  _, kept = oracles.attention(q, k, v, dense & read)
  _, full = oracles.attention(q, k, v, dense)
  at = [
    (2 * i + 1) * T // (2 * blocks_lib.SAMPLES)
    for i in range(blocks_lib.SAMPLES)
  ]
  want = np.exp(kept - full)[:, at].mean()
  assert 0.1 < want < 0.999
  np.testing.assert_allclose(aux['retained_mass'], want, 1e-5)


def test_the_schedule_sets_the_density_without_compiling_again():
  q, k = arrays()
  keep = ScheduleConfig(kind='linear', init=1.0, final=0.2, begin=2, length=4)
  config = AttentionConfig(name='psa', psa=settings(keep=keep))
  traces = []

  @jax.jit
  def density(step):
    traces.append(1)
    return module.psa(
      q, k, k, config=config, context=AttentionContext(step=step)
    )[1]['density']

  seen = [float(density(jnp.int32(i))) for i in range(9)]
  assert len(traces) == 1
  assert seen[:3] == [1, 1, 1]
  assert seen[6:] == [seen[6]] * 3 and seen[6] < 0.6
  assert all(a >= b for a, b in zip(seen, seen[1:], strict=False))


def test_evaluation_may_have_its_own_budget():
  keep = ScheduleConfig(init=0.9, final=0.9)
  config = settings(keep=keep, eval_keep=0.2)
  assert module.budget_at(config, 0, True) == jnp.float32(0.9)
  assert module.budget_at(config, 0, False) == jnp.float32(0.2)
  config = settings(keep=keep)
  assert module.budget_at(config, 0, False) == jnp.float32(0.9)


def test_list_width():
  keep = ScheduleConfig(kind='linear', init=0.5, final=0.1, length=9)
  assert module.list_width(settings(keep=keep), 1000) == 501
  assert module.list_width(settings(keep=keep, eval_keep=0.7), 1000) == 701
  assert module.list_width(settings(keep=keep, max_blocks=20), 1000) == 20
  assert module.list_width(settings(keep=keep, max_blocks=20), 10) == 10
  assert module.list_width(settings(budget='mass'), 1000) == 1000
  low = ScheduleConfig(init=1e-3, final=1e-3)
  assert module.list_width(settings(keep=low), 1000) == 6
  with pytest.raises(ConfigError, match='max_blocks=3 is less than the 6'):
    module.list_width(settings(max_blocks=3), 1000)


def test_a_full_list_width_never_drops_a_forced_block():
  """The automatic width holds sink, window and tile wherever they fall."""
  low = ScheduleConfig(init=1e-3, final=1e-3)
  for block_q, block_k, window in ((16, 8, 12), (8, 16, 33), (24, 16, 1)):
    config = settings(block_q=block_q, block_k=block_k, window=window, keep=low)
    q, k = arrays()
    got = module.select_blocks(q, k, config, budget=0.0)
    want = oracles.psa_selection(
      q, k, block_q=block_q, block_k=block_k, window=window, sink=1, keep=0.0
    )
    for (b, h, i), (forced, _, count, _) in want.items():
      assert got.counts[b, h, i] == count == len(forced)
      ids = np.asarray(got.ids[b, h, i])[:count]
      assert set(ids.tolist()) == forced


def test_selection_takes_no_gradient():
  q, k = arrays()

  def total(q, k):
    got = module.select_blocks(q, k, settings(), budget=0.5)
    return got.counts.sum().astype(jnp.float32)

  grads = jax.grad(total, (0, 1))(q, k)
  assert all((g == 0).all() for g in grads)
