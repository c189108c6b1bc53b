"""Who survives cascade pruning, against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_jax.attention.cascade import CascadeConfig, survivors
from tests.models.cascade_oracle import best_of_document, judged_on_arrival

T = 40


@pytest.mark.parametrize('layers', [1, 2, 4, 7, 12, 40])
@pytest.mark.parametrize('start', [0.15, 0.3])
def test_shares_are_whole_first_then_fall_on_a_line(layers, start):
  shares = survivors.layer_shares(layers, mean=0.4, start=start, slope=0.5)
  whole = max(1, -(-layers * round(100 * start) // 100))
  assert shares[:whole] == (1,) * whole and len(shares) == layers
  ramp = shares[whole:]
  if ramp:
    assert np.mean(ramp) == pytest.approx(0.4)
    assert ramp[0] + ramp[-1] == pytest.approx(2 * 0.4)
    assert np.ptp(np.diff(ramp)) < 1e-9 if len(ramp) > 1 else True
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    assert 0 < min(ramp) and max(ramp) < 1


def test_plan_is_scaled_by_the_amount():
  own = CascadeConfig(token_keep=0.5, head_keep=0.5)
  plan = dict(tokens=100, kv_heads=8, packed=False)
  none = survivors.plan(own, 4, amount=0.0, **plan)
  assert none == (survivors.LayerSize(100, 8, 1024),) * 4
  full = survivors.plan(own, 4, amount=1.0, **plan)
  assert [size.tokens for size in full] == [100, 75, 50, 25]
  # 30 % of four layers are two; the other two keep 0.75 and 0.25 of 8.
  assert [size.heads for size in full] == [8, 8, 6, 2]
  half = survivors.plan(own, 4, amount=0.5, **plan)
  assert [size.tokens for size in half] == [100, 88, 75, 63]
  packed = dict(tokens=100, kv_heads=1, packed=True)
  few = CascadeConfig(token_keep=0.5, head_keep=0.1, documents=4)
  sizes = survivors.plan(few, 4, amount=1.0, **packed)
  assert [size.tokens for size in sizes] == [100, 78, 53, 28]
  assert {size.heads for size in sizes} == {1}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.data())
def test_quotas_of_documents_fit_the_row(lengths, data):
  """However short they are; with the plan's room for rounding up."""
  share = data.draw(st.integers(1, 1024))
  documents = data.draw(st.integers(1, 4))
  room = -(-sum(lengths) * share // 1024) + documents - 1
  generous = np.arange(len(lengths)) < documents
  got = survivors.quota(jnp.asarray(lengths), share, jnp.asarray(generous))
  exact = np.asarray(lengths) * share / 1024
  want = np.where(generous, np.ceil(exact), np.floor(exact))
  np.testing.assert_array_equal(got, want)
  assert want.sum() <= room


def test_runs():
  number, seen, length = survivors.runs(jnp.asarray([[4, 4, 0, 7, 7, 7]]))
  assert number.tolist() == [[0, 0, 1, 2, 2, 2]]
  assert seen.tolist() == [[1, 2, 1, 1, 2, 3]]
  assert length.tolist() == [[2, 2, 1, 3, 3, 3]]


def random_rows(seed, kind):
  """Scores, which tokens are left (first, in order), and documents."""
  rng = np.random.default_rng(seed)
  place, left = np.arange(T), rng.random(T) < 0.7
  left[0] = True
  cuts = np.sort(rng.choice(T, rng.integers(0, 5), replace=False))
  document = np.searchsorted(cuts, place, side='right')
  score = {
    'random': rng.normal(size=T),
    'ties': rng.integers(0, 3, T).astype(float),
    'rising': place.astype(float),
    'falling': -place.astype(float),
    'constant': np.zeros(T),
  }[kind]
  return score, left, document


KINDS = ('random', 'ties', 'rising', 'falling', 'constant')


SHARE, BEFORE, WINDOW, CREDIT = 400, 700, 8, 3


@jax.jit
def causal(score, left, document):
  """`keep_causal` on rows that are compacted as a model does it."""
  at, alive = survivors.compact(left, T)
  number, seen, _ = survivors.runs(document)
  score, number, seen = (
    jnp.take_along_axis(x, at, axis=1) for x in (score, number, seen)
  )
  quotas = survivors.quota(seen, SHARE, number < 2)
  kept = survivors.keep_causal(
    score,
    alive,
    jnp.where(alive, quotas, 0),
    jnp.where(alive, number, -1),
    shares=(SHARE, BEFORE),
    window=WINDOW,
    credit=CREDIT,
  )
  return at, kept


@pytest.mark.parametrize('kind', KINDS)
def test_causal_rule_equals_one_token_after_the_other(kind):
  kept_all = allowed = 0
  for seed in range(20):
    score, left, document = random_rows(seed, kind)
    at, kept = causal(
      jnp.asarray(score, jnp.float32)[None],
      jnp.asarray(left)[None],
      jnp.asarray(document, jnp.int32)[None],
    )
    got = np.sort(np.asarray(at)[np.asarray(kept)]).tolist()
    want = []
    alive = np.flatnonzero(left).tolist()
    for number, d in enumerate(np.unique(document)):
      members = np.flatnonzero(document == d).tolist()
      stays = judged_on_arrival(
        members,
        alive,
        score,
        SHARE,
        number < 2,
        BEFORE,
        window=WINDOW,
        credit=CREDIT,
      )
      want += stays
      for m in range(1, len(members) + 1):
        inside = sum(j in members[:m] for j in stays)
        assert inside <= -(-m * SHARE // 1024)
      kept_all += len(stays)
      allowed += len(members) * SHARE // 1024
    assert got == want
  # The count keeps up with the quota, whatever the scores are; only dead
  # stretches and the credit at a document's end are lost.
  assert kept_all > 0.6 * allowed


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('packed', [False, True])
def test_bidirectional_rule_is_top_k_of_every_document(kind, packed):
  for seed in range(10):
    score, left, document = random_rows(seed, kind)
    if not packed:
      left, document = np.ones(T, bool), np.zeros(T, int)
    at = np.argsort(~left, kind='stable')
    length = np.asarray([(document == d).sum() for d in document])
    quotas = np.where(left, (length * 400 + 1023) // 1024, 0)
    kept = survivors.keep_bidirectional(
      jnp.asarray(score[at], jnp.float32)[None],
      jnp.asarray(quotas[at], jnp.int32)[None],
      jnp.asarray(np.where(left, document, -1)[at])[None] if packed else None,
    )
    want, alive = [], np.flatnonzero(left).tolist()
    for d in np.unique(document):
      members = np.flatnonzero(document == d).tolist()
      want += best_of_document(members, alive, score, 400, True)
    assert sorted(at[np.asarray(kept)[0]].tolist()) == sorted(want)


def test_long_documents_fill_their_quota():
  """Within `credit` of it: a row's static size is hardly wasted."""
  rng = np.random.default_rng(0)
  n, share = 4096, 512
  score = jnp.asarray(rng.normal(size=(1, n)), jnp.float32)
  seen = jnp.arange(1, n + 1, dtype=jnp.int32)[None]
  kept = survivors.keep_causal(
    score,
    jnp.ones((1, n), bool),
    survivors.quota(seen, share, jnp.ones((1, n), bool)),
    jnp.zeros((1, n), jnp.int32),
    shares=(share, 1024),
    window=64,
    credit=8,
  )
  kept = np.asarray(kept)[0]
  assert 0.97 * n / 2 < kept.sum() <= n / 2
  # And it really prefers the important ones.
  values = np.asarray(score)[0]
  assert values[kept].mean() - values[~kept].mean() > 1.0


def test_compact_keeps_order_and_marks_the_spare_rows():
  kept = jnp.asarray([[False, True, True, False, True], [False] * 5])
  at, alive = survivors.compact(kept, 4)
  assert at[0, :3].tolist() == [1, 2, 4]
  assert alive.tolist() == [[True, True, True, False], [False] * 4]
  assert all(len(set(row)) == 4 for row in at.tolist())


def test_top_heads_come_from_those_that_are_left():
  importance = jnp.asarray([[9.0, 1, 5, 5], [1, 2, 3, 4]])
  heads = jnp.asarray([[1, 2, 3], [0, 2, 3]], jnp.int32)
  got = survivors.top_heads(importance, heads, 2)
  assert got.tolist() == [[2, 3], [2, 3]]
  assert survivors.top_heads(importance, heads, 1).tolist() == [[2], [3]]


def test_pairs_count_what_each_query_reads():
  document = jnp.asarray([[0, 0, 0, 1, 1, 2]])
  alive = jnp.asarray([[True] * 5 + [False]])
  assert survivors.pairs(document, alive, True).tolist() == [6 + 3]
  assert survivors.pairs(document, alive, False).tolist() == [9 + 4]
