"""The pages of the GPU benchmark from made-up rows, and its contenders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.speed_gpu import contenders, plot, tables, timing

STAMP = dict(date='2026-01-01', commit='abc', jax='1', gpu='H100')


def row(contender, seconds, which='forward', length=65_536, **fields):
  return {
    'what': 'lengths',
    'length': length,
    'head_dim': 128,
    'contender': contender,
    'pass': which,
    'median': seconds,
    **STAMP,
    **fields,
  }


def made():
  gemm = row(contenders.GEMM, 1e-3, length=0) | {'what': 'ceilings'}
  size = contenders.GEMM_SIZE
  # As many operations in 2 ms as the product makes in 1 ms.
  pairs = 2 * size**3 / (2 * 128 * 2)
  return [
    gemm,
    row(contenders.DENSE, 20e-3),
    row('PyTorch SDPA, flash', 18e-3, version='PyTorch 2'),
    row(contenders.WHOLE, 3e-3),
    row(contenders.KERNEL, 2e-3, pairs_read=pairs, pairs_visible=pairs / 2),
    row('FlexAttention, same lists', 0) | {'error': 'no such thing'},
    row(contenders.DENSE, 1e-4, length=4096),
    row(contenders.WHOLE, 2e-4, length=4096, commit='older'),
  ]


def test_ratios_are_against_the_fastest_dense_at_the_longest_length():
  rows = made()
  del rows[5]['median']
  text = tables.sections(rows)
  assert (
    '| 128 | forward | 18 ms (PyTorch SDPA, flash) | 3 ms, 6.0x '
    '| 2 ms, 9.0x | 50 % | 25 % |'
  ) in text['ratios']
  assert '| psa | forward | 200 us | 3 ms |' in text['lengths']
  assert 'FlexAttention, same lists, forward: no such thing' in text['lengths']
  assert 'commit abc older' in text['lengths']
  assert 'PyTorch 2' in text['lengths']
  assert 'decode' not in text


def test_newest_row_counts():
  rows = [row('psa', 1.0), row('psa', 2.0), row('psa', 3.0, 'backward')]
  assert [x['median'] for x in tables.newest(rows)] == [2.0, 3.0]


def test_a_picture_is_drawn(tmp_path):
  rows = made()
  plot.draw(rows, tmp_path / 'a.png')
  assert (tmp_path / 'a.png').stat().st_size > 5_000


@pytest.fixture
def shape():
  contenders.inputs.cache_clear()
  contenders.lists.cache_clear()
  return contenders.Shape(2048, heads=2, kv_heads=1, head_dim=16)


def test_work_counts_the_pairs_of_the_lists(shape):
  made = contenders.lists(shape)
  ids, counts = np.asarray(made.ids)[0], np.asarray(made.counts)[0]
  block_q, block_k = contenders.BLOCK_Q, contenders.BLOCK_K
  read = visible = 0
  for head, tile in np.ndindex(counts.shape):
    for block in ids[head, tile, : counts[head, tile]]:
      read += block_q * block_k
      t = tile * block_q + np.arange(block_q)[:, None]
      visible += (block * block_k + np.arange(block_k)[None] <= t).sum()
  found = contenders.work(shape)
  assert found['pairs_read'] == 2 * read  # two heads share a list
  assert found['pairs_visible'] == 2 * visible
  assert counts.max() <= contenders.BLOCKS


def test_the_whole_operation_is_selection_and_kernel(shape):
  q, k, v, _ = contenders.inputs(shape)
  made = contenders.lists(shape)
  whole = jax.jit(contenders.attend_sparse)(q, k, v)
  alone = contenders.attend_listed('xla', q, k, v, made.ids, made.counts)
  np.testing.assert_array_equal(
    whole.astype(jnp.float32), alone.astype(jnp.float32)
  )


def test_a_chain_decodes_steps_that_depend_on_each_other():
  at = contenders.Cache(jnp.ones((1,)), *[jnp.zeros(())] * 4)
  seen = []
  call = timing.chained(lambda q, at: seen.append(q) or q, at)
  assert call(2) > 0
  assert len(seen) == timing.STEPS
