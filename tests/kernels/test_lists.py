"""Transposed block lists against brute force, and the run-time check."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import base
from psa_jax.config import AttentionConfig
from psa_jax.kernels.block_sparse import block_sparse_attention, lists

BLOCKS, TILES, M = 5, 4, 3
_transpose = jax.jit(lists.transpose, static_argnums=2)


def random_lists(rng, B=2, K=2):
  """Lists without duplicates, with garbage past the counts."""
  ids = [rng.permutation(BLOCKS)[:M] for _ in range(B * K * TILES)]
  ids = np.stack(ids).reshape(B, K, TILES, M).astype(np.int32)
  counts = rng.integers(0, M + 1, size=(B, K, TILES)).astype(np.int32)
  past = np.arange(M) >= counts[..., None]
  junk = rng.choice([-3, 0, BLOCKS, 10**6], size=ids.shape)
  return np.where(past, junk, ids).astype(np.int32), counts


@hypothesis.given(seed=st.integers(0, 2**31))
def test_transpose_against_brute_force(seed):
  ids, counts = random_lists(np.random.default_rng(seed))
  got = _transpose(jnp.asarray(ids), jnp.asarray(counts), BLOCKS)
  offsets, tiles = np.asarray(got.offsets), np.asarray(got.tiles)
  assert offsets.shape == (2, 2, BLOCKS + 1)
  for b, h in np.ndindex(2, 2):
    assert offsets[b, h, 0] == 0
    assert offsets[b, h, -1] == counts[b, h].sum()
    for j in range(BLOCKS):
      want = [i for i in range(TILES) if j in ids[b, h, i][: counts[b, h, i]]]
      read = tiles[b, h, offsets[b, h, j] : offsets[b, h, j + 1]]
      assert read.tolist() == want, (b, h, j)


def test_check_lets_good_lists_through_and_names_the_bad_one():
  ids, counts = random_lists(np.random.default_rng(0))
  counts[1, 0, 2], ids[1, 0, 2] = 3, (2, 0, 4)
  lists.check(ids, counts, BLOCKS)
  where = 'batch row 1, kv head 0, query tile 2'
  for bad, message in (
    ((2, 0, 2), f'{where} names a block twice'),
    ((2, 0, 5), rf'{where} names a block outside \[0, 5\)'),
    ((-1, 0, 2), rf'{where} names a block outside \[0, 5\)'),
  ):
    ids[1, 0, 2] = bad
    with pytest.raises(ValueError, match=message):
      lists.check(ids, counts, BLOCKS)
  ids[1, 0, 2] = (2, 0, 2)
  counts[1, 0, 2] = 2
  lists.check(ids, counts, BLOCKS)
  counts[1, 0, 2] = 4
  with pytest.raises(
    ValueError, match=rf'{where} has count 4, not in \[0, 3\]'
  ):
    lists.check(ids, counts, BLOCKS)


def test_a_duplicate_stops_a_jitted_program():
  x = jnp.ones((1, 8, 1, 4))
  counts = jnp.full((1, 1, 2), 2, jnp.int32)

  @jax.jit
  def run(ids):
    return block_sparse_attention(
      x, x, x, ids, counts, block_q=4, block_k=4, check_lists=True
    )[0]

  good = jnp.asarray([[[[0, 1], [1, 0]]]], jnp.int32)
  run(good).block_until_ready()
  jax.effects_barrier()
  with pytest.raises(Exception, match='query tile 1 names a block twice'):
    run(good.at[0, 0, 1, 1].set(1)).block_until_ready()
    jax.effects_barrier()


@pytest.mark.parametrize('on', [False, True])
def test_the_config_switches_the_check_on(on, monkeypatch):
  """`attention.check_lists` reaches the kernel of psa."""
  seen = []
  monkeypatch.setattr(lists, 'check', lambda *args, **_: seen.append(args))
  x = jnp.ones((1, 8, 1, 4))
  config = AttentionConfig(name='psa', check_lists=on)
  out = jax.jit(lambda x: base.attend(x, x, x, config=config, step=0).out)(x)
  out.block_until_ready()
  jax.effects_barrier()
  assert bool(seen) == on
