"""Transposed block lists against brute force, and the run-time check."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import attend as library_attend
from psa_jax.attention.context import AttentionContext
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


def test_transpose_of_what_fits_no_int32(monkeypatch):
  """A block and a tile that are no single number are sorted as a pair."""
  ids, counts = map(jnp.asarray, random_lists(np.random.default_rng(1)))
  want = lists.transpose(ids, counts, BLOCKS)
  monkeypatch.setattr(lists, 'LARGEST', 0)
  got = lists.transpose(ids, counts, BLOCKS)
  np.testing.assert_array_equal(got.offsets, want.offsets)
  for b, h in np.ndindex(2, 2):
    end = int(want.offsets[b, h, -1])
    np.testing.assert_array_equal(got.tiles[b, h, :end], want.tiles[b, h, :end])


@pytest.mark.tier('default')
@hypothesis.given(seed=st.integers(0, 2**31), most=st.integers(1, TILES))
def test_shares_hold_every_reader_once_and_few_each(seed, most):
  rng = np.random.default_rng(seed)
  ids, counts = random_lists(rng)
  ids[..., 0] = 1  # every tile that reads anything reads block 1
  ids[..., 1:][ids[..., 1:] == 1] = 0
  counts = np.minimum(counts, 2)
  ids[..., 1][ids[..., 1] == 1] = 2
  readers = _transpose(jnp.asarray(ids), jnp.asarray(counts), BLOCKS)
  shares = lists.share_out(readers, TILES, most)
  block, first, count = (np.asarray(x) for x in shares[:3])
  assert count.max() <= most
  assert block.shape[-1] == shares.extra + BLOCKS
  offsets, tiles = np.asarray(readers.offsets), np.asarray(readers.tiles)
  for b, h in np.ndindex(2, 2):
    read = [[] for _ in range(BLOCKS)]
    for j, begin, n in zip(block[b, h], first[b, h], count[b, h], strict=True):
      read[j] += tiles[b, h, begin : begin + n].tolist()
    for j in range(BLOCKS):
      want = tiles[b, h, offsets[b, h, j] : offsets[b, h, j + 1]].tolist()
      assert read[j] == want, (b, h, j)
    own = np.asarray(shares.block)[b, h, shares.extra :]
    np.testing.assert_array_equal(own, np.arange(BLOCKS))
  # The sum over all shares of a block is put where the block is.
  weight = jnp.asarray(rng.normal(size=tiles.shape), jnp.float32)
  at = first[..., None] + np.arange(TILES)
  value = np.take_along_axis(
    np.asarray(weight)[..., None, :],
    np.minimum(at, tiles.shape[-1] - 1),
    -1,
  )
  sums = np.where(np.arange(TILES) < count[..., None], value, 0).sum(-1)
  whole = np.moveaxis(sums[..., shares.extra :], 1, 2)[:, :, None, :, None]
  got = whole
  if shares.extra:
    partial = jnp.asarray(sums[..., : shares.extra, None, None])
    got = lists.join_shares(jnp.asarray(whole), partial, readers, TILES, most)
  want = np.zeros(whole.shape, np.float32)
  for b, h, j in np.ndindex(2, 2, BLOCKS):
    span = slice(offsets[b, h, j], offsets[b, h, j + 1])
    want[b, j, 0, h, 0] = np.asarray(weight)[b, h, span].sum()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


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
  out = jax.jit(
    lambda x: (
      library_attend(
        x, x, x, config=config, context=AttentionContext(step=0)
      ).out
    )
  )(x)
  out.block_until_ready()
  jax.effects_barrier()
  assert bool(seen) == on
