"""Block summaries and the ranking of blocks, against loops in float64."""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import block_scores
from psa_jax.kernels.block_scores import IMPLEMENTATIONS, Ranges, top_blocks
from psa_jax.kernels.block_scores import xla as xla_module
from tests import oracles

B, S, K, H, BLOCK = 3, 37, 2, 4, 5
BLOCKS = 8
every = pytest.mark.parametrize('implementation', list(IMPLEMENTATIONS))


def check_pooled(got, k, lengths, segments=None):
  """Compares summaries with `oracles.pool`; minima and maxima bit for bit."""
  want = oracles.pool(k, lengths, BLOCK, got.total.shape[2], segments)
  size = want['size']
  some = size > 0
  np.testing.assert_array_equal(np.asarray(got.size)[some], size[some])
  some = np.broadcast_to(some[:, None], want['total'].shape[:3])
  oracles.check_close(
    np.asarray(got.total)[some], want['total'][some], what='total'
  )
  if got.bounded:
    for name in ('low', 'high'):
      np.testing.assert_array_equal(
        np.asarray(getattr(got, name))[some], want[name][some]
      )


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('length', [35, 37])
def test_pool_is_the_definition(length, cut):
  rng = np.random.default_rng(length)
  k = rng.normal(size=(B, length, K, H)).astype(np.float32)
  segments = np.sort(rng.integers(0, 4, size=(B, length)), 1) if cut else None
  given = {} if segments is None else dict(segment_ids=jnp.asarray(segments))
  for lengths in (None, np.array([0, 11, length])):
    got = block_scores.pool(
      jnp.asarray(k),
      block_k=BLOCK,
      lengths=None if lengths is None else jnp.asarray(lengths),
      **given,
    )
    full = np.full(B, length) if lengths is None else lengths
    check_pooled(got, k, full, segments)
  means = block_scores.pool(jnp.asarray(k), block_k=BLOCK, bounds=False)
  assert means.low is None and means.high is None
  check_pooled(means, k, np.full(B, length))


@functools.partial(jax.jit, static_argnames='block_k')
def append(pooled, new, lengths, starts, counts, block_k=BLOCK):
  return block_scores.append(
    pooled, new, lengths, block_k=block_k, starts=starts, counts=counts
  )


@pytest.mark.tier('default')
@pytest.mark.parametrize('bounds', [False, True])
@pytest.mark.parametrize('most', [1, 3, 13])
@hypothesis.given(seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=8)
def test_appending_equals_pooling_from_scratch(most, bounds, seed):
  """After every step of a ragged batch of rows with several documents."""
  rng = np.random.default_rng(seed)
  k = rng.normal(size=(B, S, K, H)).astype(np.float32)
  segments = np.cumsum(rng.random((B, S)) < 0.1, 1)
  new = np.pad(np.diff(segments, axis=1) != 0, ((0, 0), (1, 0)))
  starts = np.maximum.accumulate(np.where(new, np.arange(S), 0), 1)
  pooled = block_scores.empty(B, S, K, H, block_k=BLOCK, bounds=bounds)
  lengths = np.zeros(B, np.int32)
  while (lengths < S).any():
    counts = rng.integers(0, most + 1, size=B)
    counts = np.minimum(counts, S - lengths).astype(np.int32)
    at = np.minimum(lengths[:, None] + np.arange(most), S - 1)
    row = np.arange(B)[:, None]
    pooled = append(pooled, k[row, at], lengths, starts[row, at], counts)
    lengths = lengths + counts
    check_pooled(pooled, k, lengths, segments)


def test_a_row_starts_anew_without_clearing():
  rng = np.random.default_rng(0)
  old, k = rng.normal(size=(2, B, S, K, H)).astype(np.float32)
  pooled = block_scores.pool(jnp.asarray(old), block_k=BLOCK)
  lengths = np.array([0, 20, 0], np.int32)
  mixed = np.where(
    np.arange(S)[None, :, None, None] < lengths[:, None, None, None], old, k
  )
  for t in range(9):
    row = np.arange(B)
    new = mixed[row, lengths + t][:, None]
    pooled = append(pooled, new, lengths + t, None, None)
  want = oracles.pool(mixed, lengths + 9, BLOCK, BLOCKS)
  for b in range(B):
    whole = (lengths[b] + 9) // BLOCK + 1
    oracles.check_close(pooled.total[b, :, :whole], want['total'][b, :, :whole])
    np.testing.assert_array_equal(
      pooled.size[b, :whole], want['size'][b, :whole]
    )


def test_keys_without_room_are_dropped():
  pooled = block_scores.empty(1, 10, 1, H, block_k=BLOCK)
  new = jnp.ones((1, 8, 1, H))
  got = append(pooled, new, jnp.array([6]), None, None)
  np.testing.assert_array_equal(got.size, [[0, 4]])


def test_the_work_of_append_does_not_grow_with_the_cache():
  """No operation makes anything cache-sized but the scatters in place."""

  def sizes(room):
    pooled = jax.eval_shape(
      lambda: block_scores.empty(B, room, K, H, block_k=BLOCK)
    )
    new = jax.ShapeDtypeStruct((B, 3, K, H), jnp.float32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    jaxpr = jax.make_jaxpr(
      functools.partial(block_scores.append, block_k=BLOCK)
    )(pooled, new, lengths)
    return sorted(
      (e.primitive.name, v.aval.size)
      for e in equations(jaxpr.jaxpr)
      if e.primitive.name not in ('scatter', 'pjit', 'jit')
      for v in e.outvars
    )

  assert sizes(100) == sizes(100_000)


def equations(jaxpr):
  """All equations of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def make_ranges(rng, tiles):
  """Random but consistent ranges."""
  begin = rng.integers(0, BLOCKS - 1, size=(B, tiles))
  end = rng.integers(begin + 1, BLOCKS + 1)
  scored = rng.integers(0, end + 1)
  sink = begin + rng.integers(0, 3, size=(B, tiles))
  near = rng.integers(0, BLOCKS + 2, size=(B, tiles))
  arrays = (jnp.asarray(x, jnp.int32) for x in (begin, end, scored, sink, near))
  return Ranges(*arrays)


@pytest.mark.tier('default')
@every
@pytest.mark.parametrize('bounds', [False, True])
@pytest.mark.parametrize('tiles, at_once', [(1, 64), (7, 3), (7, 64)])
def test_ranking_is_the_definition(
  tiles, at_once, bounds, implementation, monkeypatch
):
  monkeypatch.setattr(xla_module, 'TILES_AT_ONCE', at_once)
  rng = np.random.default_rng(tiles + bounds)
  k = rng.normal(size=(B, S, K, H)).astype(np.float32)
  q = 2 * rng.normal(size=(B, tiles, 3 * K, H)).astype(np.float32)
  ranges = make_ranges(rng, tiles)
  call = functools.partial(
    top_blocks,
    bounds=bounds,
    stop=lambda scores, order: scores.eligible.sum((3, 4)) + order[..., 0],
    implementation=implementation,
  )
  pooled = block_scores.pool(jnp.asarray(k), block_k=BLOCK)
  full, counts = jax.jit(functools.partial(call, width=BLOCKS))(
    jnp.asarray(q), pooled, ranges
  )
  some, none = jax.jit(functools.partial(call, width=3, stop=None))(
    jnp.asarray(q), pooled, ranges
  )
  assert none is None
  np.testing.assert_array_equal(some, full[..., :3])
  want = oracles.block_ranking(q, k, BLOCK, ranges, bounds)
  for (b, h, i), (forced, ranked) in want.items():
    ids = np.asarray(full[b, h, i]).tolist()
    assert sorted(ids) == list(range(BLOCKS))
    assert ids[: len(forced)] == forced[::-1]
    visible = int(ranges.visible()[b, i])
    assert ids[len(forced) : visible] == ranked
    assert ranges.forced()[b, i] == len(forced)
    begin, scored = int(ranges.begin[b, i]), int(ranges.scored[b, i])
    assert counts[b, h, i] == max(0, scored - begin) + ids[0]


def test_scores_never_exist_for_all_tiles(monkeypatch):
  """The largest array is one chunk of scores, the lists, or an input."""
  monkeypatch.setattr(xla_module, 'TILES_AT_ONCE', 4)
  tiles, blocks, N, width = 512, 256, 2, 4
  pooled = jax.eval_shape(
    lambda: block_scores.empty(1, blocks * BLOCK, 1, H, block_k=BLOCK)
  )
  q = jax.ShapeDtypeStruct((1, tiles, N, H), jnp.float32)
  each = jax.ShapeDtypeStruct((1, tiles), jnp.int32)
  jaxpr = jax.make_jaxpr(
    functools.partial(top_blocks, width=width, bounds=True)
  )(q, pooled, Ranges(*[each] * 5))
  largest = max(v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars)
  assert largest <= tiles * N * H < tiles * blocks


def test_errors_name_the_mend():
  rng = np.random.default_rng(0)
  k = jnp.asarray(rng.normal(size=(B, S, K, H)), jnp.float32)
  q = jnp.zeros((B, 4, K, H))
  ranges = make_ranges(rng, 4)
  means = block_scores.pool(k, block_k=BLOCK, bounds=False)
  # Past the run-time shape check that only tests switch on.
  call = functools.partial(inspect.unwrap(top_blocks), width=2)
  with pytest.raises(ValueError, match='pooled with bounds=True'):
    call(q, means, ranges, bounds=True)
  with pytest.raises(ValueError, match=r'width=9 must be in \[1, 8\]'):
    call(q, means, ranges, width=9)
  with pytest.raises(ValueError, match='not a multiple of 2 kv heads'):
    call(q[:, :, :1], means, ranges)
  with pytest.raises(ValueError, match='do not fit'):
    call(q[:1], means, ranges)
  with pytest.raises(ValueError, match='ranges'):
    call(q[:, :2], means, ranges)
  with pytest.raises(ValueError, match='unknown implementation'):
    call(q, means, ranges, implementation='cuda')
