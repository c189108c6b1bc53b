"""Which blocks are chosen where a softmax in f32 is 0 almost everywhere.

Queries and keys up to 1,000 times as large: scores lie apart by up to 10^6 and
more, and a softmax value is 0 beyond 104. Blocks that tied would be taken by
their position. The right choice is that of float64 logarithms, up to blocks
whose importance float32 cannot tell apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import hybrid, psa
from psa_jax.attention.nsa import branches
from psa_jax.kernels import block_scores, compressed
from psa_jax.kernels.decode import decode_attention
from tests import oracles
from tests.attention import nsa_oracle, test_nsa
from tests.attention.nsa_oracle import Sizes

pytestmark = pytest.mark.tier('default')

SCALES = (1, 10, 100, 1000)
B, T, N, K, H = 2, 96, 4, 2, 8
SHAPES = dict(block_q=8, block_k=4, window=6, sink_blocks=1)
dtypes = pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])


def arrays(scale, dtype, seed=0):
  """Queries, and keys that differ little inside a block: bounds are tight."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, T, N, H))
  k = rng.normal(size=(B, T // 4, K, H)).repeat(4, 1)
  k += 0.01 * rng.normal(size=k.shape)
  return tuple(jnp.asarray(scale * x, dtype) for x in (q, k))


def exact(*arrays):
  return [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


def slack(q, k):
  """What rounding in f32 may change of a score."""
  return 1e-6 * (1 + np.abs(q).max() * np.abs(k).max() * H**0.5)


def importance(q, k, bounds):
  """{(b, kv head, tile): {block: log importance}} of whole blocks, float64."""
  block_q, block_k, G, found = 8, 4, N // K, {}
  for b, h, i in np.ndindex(B, K, T // block_q):
    whole = range((i * block_q + 1) // block_k)
    heads = []
    for x in q[b, i * block_q, h * G : (h + 1) * G] * H**-0.5:
      keys = [k[b, block_k * j : block_k * (j + 1), h] for j in whole]
      score = [x @ y.mean(0) for y in keys]
      if bounds:
        score = [np.maximum(x * y.min(0), x * y.max(0)).sum() for y in keys]
      heads.append([s - oracles.log_sum(score) for s in score])
    each = zip(*heads, strict=True)
    found[b, h, i] = {j: oracles.log_sum(x) for j, x in enumerate(each)}
  return found


def check_best(chosen, worth, error, what):
  """`chosen`, in order, are the best of `worth`, whatever else is there."""
  rest = sorted((worth[j] for j in worth if j not in chosen), reverse=True)
  for j in reversed(chosen):
    assert worth[j] >= max(rest, default=-np.inf) - error, (what, j)
    rest.append(worth[j])


@dtypes
@pytest.mark.parametrize(
  ('scoring', 'budget', 'amount'),
  [
    ('mean', 'ratio', 0.6),
    ('bounds', 'ratio', 0.6),
    ('bounds', 'mass', 0.9),
  ],
)
def test_psa_reads_the_blocks_of_float64(scoring, budget, amount, dtype):
  """As many, too: a mass of 0 against 0 is no guarantee."""
  cfg = psa.PsaConfig(**SHAPES, scoring=scoring, budget=budget, max_blocks=T)
  select = jax.jit(
    lambda q, k: psa.select_blocks(q, k, cfg, budget=jnp.float32(amount))
  )
  chose = 0
  for scale in SCALES:
    q, k = arrays(scale, dtype)
    got, wide = select(q, k), exact(q, k)
    worth = importance(*wide, scoring == 'bounds')
    want = oracles.psa_selection(
      *wide,
      block_q=8,
      block_k=4,
      window=6,
      sink=1,
      keep=amount if budget == 'ratio' else None,
      mass=amount if budget == 'mass' else None,
      bounds=scoring == 'bounds',
    )
    for (b, h, i), (forced, ranked, count, _) in want.items():
      ids = np.asarray(got.ids[b, h, i])[: got.counts[b, h, i]].tolist()
      assert len(ids) == count and set(ids[: len(forced)]) == forced
      others = {j: worth[b, h, i][j] for j in ranked}
      chosen = [j for j in ids[len(forced) :] if j in others]
      check_best(chosen, others, slack(*wide), (scale, b, h, i))
      chose += 0 < len(chosen) < len(ranked)
  assert chose > 100


@dtypes
def test_every_implementation_and_decoding_rank_alike(dtype):
  """The whole order; decoding asks with one query and summaries of a cache."""
  cfg = hybrid.HybridConfig(**SHAPES, min_blocks=T, max_blocks=T)
  run = jax.jit(functools.partial(hybrid.select_blocks, cfg=cfg, cap=1.0))

  @jax.jit
  def decode(q, k, positions):
    pooled = block_scores.pool(k, block_k=4, bounds=False)
    return hybrid.select_for_decode(
      q, pooled, cfg, positions=positions, cap=1.0
    )

  @jax.jit
  def reference(q, k):
    queries, pooled, tiles = hybrid.summarise(q, k, cfg, None, bounds=False)
    ranges, _ = hybrid.tile_ranges(cfg, tiles, T // 4)
    return block_scores.top_blocks(
      queries, pooled, ranges, width=T // 4, implementation='reference'
    )[0]

  for scale in SCALES:
    q, k = arrays(scale, dtype)
    wide = exact(q, k)
    worth = importance(*wide, False)
    want = oracles.psa_selection(
      *wide, block_q=8, block_k=4, window=6, sink=1, keep=1.0
    )
    got, plain = run(q, k)[0], reference(q, k)
    last = decode(q[:, T - 8 :][:, :1], k, jnp.full((B,), T - 8))
    for (b, h, i), (forced, ranked, _, visible) in want.items():
      lists = [got.ids[b, h, i], plain[b, h, i]]
      if i == T // 8 - 1:
        lists.append(last.ids[b, h, 0])
      for ids in lists:
        seen = np.asarray(ids)[:visible].tolist()
        assert set(seen[: len(forced)]) == forced
        others = {j: worth[b, h, i][j] for j in ranked}
        order = [j for j in seen[len(forced) :] if j in others]
        assert set(order) == set(others)
        check_best(order, others, slack(*wide), (scale, b, h, i))


@pytest.mark.parametrize(
  ('implementation', 'dtype'),
  [('xla', 'float32'), ('xla', 'bfloat16'), ('reference', 'float32')],
)
def test_nsa_selects_the_blocks_of_float64(implementation, dtype):
  """From compressed keys, by the log-sum-exp of both kinds of attention."""
  sizes = Sizes(l=4, d=2, select=8, n=6, w=3)
  cfg, blocks = test_nsa.config(sizes, implementation), T // sizes.select
  small = dict(block=sizes.l, stride=sizes.d)
  q, k = arrays(1, dtype)
  k = k[:, : compressed.count(T, **small)]
  mask = nsa_oracle.compress_mask(B, K, T, sizes)
  every = jnp.arange(-(-k.shape[1] // 8), dtype=jnp.int32)

  @jax.jit
  def select(q, k):
    _, lse = compressed.compressed_attention(q, k, k, **small)
    ids, counts, _ = branches.select(q, k, lse, cfg, 6, None, 1, blocks)
    # A decoding step has its log-sum-exp from another kernel.
    _, newest = decode_attention(
      q[:, -1:],
      k,
      k,
      jnp.broadcast_to(every, (B, K, len(every))),
      jnp.full((B, K), len(every)),
      jnp.full((B,), k.shape[1]),
      block_k=8,
    )
    at = jnp.full((B, 1), T - 1)
    last = compressed.top_blocks(
      q[:, -1:],
      k,
      newest,
      at,
      branches.visible_blocks(cfg.nsa, at, None),
      **small,
      select_block=sizes.select,
      blocks=blocks,
      width=6,
      implementation=implementation,
    )
    return ids, counts, last

  for scale in SCALES:
    large = q * scale, k * scale
    ids, counts, last = (np.asarray(x) for x in select(*large))
    worth = nsa_oracle.scores(*exact(*large), mask, sizes)
    error = slack(*exact(*large))
    for (b, h, t), blocks in worth.items():
      lists = [ids[b, h, t][: counts[b, h, t]]]
      if t == T - 1:
        lists.append(last[b, h, 0])
      own = t // sizes.select
      others = {j: x for j, x in blocks.items() if 0 < j < own - 1}
      for chosen in lists:
        assert len(set(chosen)) == min(6, own + 1)
        assert {0, own, max(own - 1, 0)} <= set(chosen)
        order = [j for j in chosen if j in others]
        check_best(order, others, error, (scale, b, h, t))
