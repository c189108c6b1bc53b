"""Controls of psa: the nearest blocks, and any blocks, at the same budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import attend as library_attend
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import (
  PsaConfig,
  psa,
  select_blocks,
  select_for_decode,
)
from psa_jax.config import AttentionConfig, ScheduleConfig
from psa_jax.kernels import block_scores

pytestmark = pytest.mark.tier('default')

B, T, N, K, H = 2, 128, 4, 2, 8
BLOCK_Q, BLOCK_K, WINDOW = 16, 8, 12


def settings(scoring, keep=0.4):
  return PsaConfig(
    block_q=BLOCK_Q,
    block_k=BLOCK_K,
    window=WINDOW,
    scoring=scoring,
    keep=ScheduleConfig(init=keep),
  )


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  q = jnp.asarray(2 * rng.normal(size=(B, T, N, H)), jnp.float32)
  k = jnp.asarray(rng.normal(size=(B, T, K, H)), jnp.float32)
  return q, k


def select(scoring, keep=0.4, data=0, **kw):
  cfg = settings(scoring, keep)
  return select_blocks(*arrays(data), cfg, budget=jnp.float32(keep), **kw)


def sets(blocks):
  """What each (row, head, tile) reads."""
  ids, counts = np.asarray(blocks.ids), np.asarray(blocks.counts)
  return {
    place: frozenset(ids[place][: counts[place]].tolist())
    for place in np.ndindex(counts.shape)
  }


@pytest.mark.parametrize('keep', [0.2, 0.4, 0.7])
def test_the_controls_spend_the_budget_of_psa(keep):
  want = select('mean', keep).counts
  for scoring in ('random', 'recent'):
    np.testing.assert_array_equal(select(scoring, keep).counts, want)


def test_recent_is_the_sink_and_one_window():
  blocks = select('recent')
  for (row, head, tile), read in sets(blocks).items():
    end = (tile + 1) * BLOCK_Q // BLOCK_K
    count = int(blocks.counts[row, head, tile])
    nearest = range(end - count + 1, end)
    assert read == {0, *nearest} or read == set(range(end))


def test_random_keeps_what_psa_always_keeps_and_looks_at_no_key():
  read = sets(select('random'))
  assert read == sets(select('random', data=5))
  assert any(
    read[place] != other for place, other in sets(select('mean')).items()
  )
  for (_, _, tile), mine in read.items():
    first = tile * BLOCK_Q
    near = max(first - WINDOW + 1, 0) // BLOCK_K
    end = (first + BLOCK_Q) // BLOCK_K
    assert {0, *range(near, end)} <= mine <= set(range(end))


def test_random_blocks_are_equally_likely():
  """Blocks of the last tile that are not forced, over many steps."""
  cfg = settings('random')
  draw = jax.jit(
    lambda seed: select_blocks(
      *arrays(), cfg, budget=jnp.float32(0.4), seed=seed
    )
  )
  forced = {0, 12, 13, 14, 15}
  times = np.zeros(T // BLOCK_K)
  steps = 400
  for step in range(steps):
    for block in sets(draw(step))[0, 0, 7] - forced:
      times[block] += 1
  free = times[1:12]
  assert free.sum() == steps * 2  # ceil(0.4 * 16) - 5
  np.testing.assert_allclose(free / steps, 2 / 11, atol=0.07)


def test_training_varies_and_evaluation_does_not():
  q, k = arrays()
  config = AttentionConfig('psa', psa=settings('random'))

  @jax.jit
  def out(step):
    return [
      psa(
        q, k, k, config=config, context=AttentionContext(step=step, train=train)
      ).out
      for train in (True, False)
    ]

  (train_1, eval_1), (train_2, eval_2) = out(1), out(2)
  np.testing.assert_array_equal(eval_1, eval_2)
  assert (train_1 != train_2).any()
  np.testing.assert_array_equal(train_1, out(1)[0])


@pytest.mark.parametrize('scoring', ['random', 'recent'])
def test_decoding_reads_what_prefill_reads(scoring):
  cfg, (q, k) = settings(scoring), arrays()
  want = select_blocks(q, k, cfg, budget=jnp.float32(0.4))
  tile = 5
  got = select_for_decode(
    q[:, tile * BLOCK_Q :][:, :1],
    block_scores.pool(k, block_k=BLOCK_K, bounds=False),
    cfg,
    positions=jnp.full((B,), tile * BLOCK_Q),
    budget=jnp.float32(0.4),
  )
  mine = {place[:2]: read for place, read in sets(got).items()}
  for (row, head, at), read in sets(want).items():
    if at == tile:
      assert mine[row, head] == read


def test_they_are_configured_by_one_key():
  out = library_attend(
    *arrays(),
    arrays()[1],
    config=AttentionConfig('psa', psa=settings('recent')),
    context=AttentionContext(step=0),
  )
  assert 0 < float(out.aux['density']) < 0.7
