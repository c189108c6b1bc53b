"""The speed experiment runs, and times what it says it times."""

import functools
import subprocess

import jax
import numpy as np
import pytest

from experiments.bench import attention as lib
from experiments.bench import cli, peers, training
from experiments.bench.attention import Shape, Sparse
from experiments.bench.passes import forward_and_backward, passes
from experiments.speed_64k import contenders, measurements
from experiments.speed_64k.__main__ import EXPERIMENT

BLOCK_Q = contenders.BLOCK_Q
ALL = contenders.sparse(16)  # blocks of 1,024 tokens


@pytest.fixture
def here(monkeypatch):
  """What a process of its own answers is answered here."""
  monkeypatch.setattr(
    measurements,
    'answer',
    lambda settings, name: measurements.CHILDREN[name](settings),
  )
  peers.find.cache_clear()


@pytest.mark.tier('default')
def test_every_measurement_of_lists_runs(here, capsys):
  """Without PyTorch, which costs one line however often it is asked for."""
  assert cli.main(EXPERIMENT, ['--quick']) == 0
  shown = capsys.readouterr()
  for line in (
    '| psa, 14 blocks | forward+backward |',
    '| psa kernel alone, 14 blocks | backward |',
    '| jax.nn.dot_product_attention | forward |',
    '| psa, 14 blocks | XLA temporaries |',
  ):
    assert line in shown.out
  assert shown.err.count('make bench-peers') == 1


@pytest.mark.tier('default')
def test_every_measurement_of_the_recipe_runs(here, capsys, monkeypatch):
  monkeypatch.setattr(training, 'temporaries', lambda config, length: length)
  flags = ['--quick', '--set', 'what=attention,step,memory']
  assert cli.main(EXPERIMENT, flags) == 0
  shown = capsys.readouterr().out
  assert '| psa_jax psa | forward |' in shown and '| 512 |' in shown
  assert shown.count('whole train step') == 2


def test_sizes_are_taken_in_a_process_without_fused_kernels(monkeypatch):
  asked = []

  def run(command, *, env, cwd, check, stdout, text):
    asked.append((command, env['XLA_FLAGS']))
    return subprocess.CompletedProcess(command, 0, 'noise\n7\n')

  monkeypatch.setattr(measurements.subprocess, 'run', run)
  settings = measurements.SpeedSettings(length=64)
  assert measurements.answer(settings, 'temporaries') == 7
  ((command, flags),) = asked
  assert command[1:] == [
    '-m', 'experiments.speed_64k', '--child=temporaries', '--set=length=64'
  ]  # fmt: skip
  assert measurements.NO_FUSED_KERNELS in flags


def test_lists_have_the_size_that_the_setting_names():
  made = lib.lists(Shape(4096), contenders.sparse(24))
  tiles = np.arange(4096 // BLOCK_Q)
  visible = 4 * (tiles + 1)
  np.testing.assert_array_equal(made.counts[0, 0], np.minimum(visible, 24))


@pytest.mark.parametrize(
  'shape, sparse',
  [
    (Shape(2048), contenders.sparse(14)),
    (Shape(1000), contenders.sparse(14)),
    (Shape(700), contenders.sparse(14)),
    (Shape(1500, 4, 2, 16, 'bfloat16'), Sparse(12, block_q=64)),
  ],
)
def test_work_counts_pairs(shape, sparse):
  """Against a count over a mask of all pairs of each kv head."""
  made, T = lib.lists(shape, sparse), shape.length
  ids, counts = np.asarray(made.ids)[0], np.asarray(made.counts)[0]
  mask = np.zeros((shape.kv_heads, T, -(-T // sparse.block_k) * 64), bool)
  for head, tile in np.ndindex(counts.shape):
    for j in ids[head, tile, : counts[head, tile]]:
      rows = slice(tile * sparse.block_q, (tile + 1) * sparse.block_q)
      mask[head, rows, j * 64 : (j + 1) * 64] = True
  group = shape.heads // shape.kv_heads
  work = lib.work(shape, sparse)
  assert work.pairs_read == group * mask.sum()
  assert work.pairs_visible == group * np.tril(mask).sum()
  assert counts.max() <= sparse.blocks


def test_density_is_of_what_causal_attention_reads():
  work = lib.work(Shape(2048), contenders.sparse(14))
  visible = 4 * np.arange(1, 9)
  kept = np.minimum(visible, 14).sum()
  assert work.density == pytest.approx(kept / visible.sum())
  assert work.share_of_square == pytest.approx(kept / (8 * 32))


def exact(T, q_from=0):
  q, k, v, _ = (np.asarray(x, np.float64) for x in lib.inputs(Shape(T)))
  mask = np.tril(np.ones((T, T), bool))[q_from:]
  s = np.where(mask, q[0, q_from:, 0] @ k[0, :, 0].T / 8, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True) @ v[0, :, 0]


@pytest.mark.parametrize(
  'attend',
  [functools.partial(lib.attend_sparse, ALL), lib.attend_dense, lib.attend_jax],
  ids=['psa, all blocks', 'dense', 'jax'],
)
def test_every_contender_computes_causal_attention(attend):
  q, k, v, _ = lib.inputs(Shape(1024))
  np.testing.assert_allclose(attend(q, k, v)[0, :, 0], exact(1024), atol=2e-5)


def test_the_kernel_alone_is_the_whole_operation_without_its_selection():
  q, k, v, grad = lib.inputs(Shape(1536))
  sparse = contenders.sparse(14)
  made = lib.lists(Shape(1536), sparse)
  whole, alone = (
    forward_and_backward(functools.partial(attend, sparse))
    for attend in (lib.attend_sparse, lib.attend_listed)
  )
  want = jax.jit(whole)(q, k, v, grad)
  got = jax.jit(alone)(q, k, v, grad, made.ids, made.counts)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_one_program_gives_the_gradients_of_the_two_passes():
  q, k, v, grad = lib.inputs(Shape(512))
  both = jax.jit(forward_and_backward(lib.attend_dense))
  _, grads = both(q, k, v, grad)
  _, pullback = jax.vjp(lib.attend_dense, q, k, v)
  for got, want in zip(grads, pullback(grad), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  'decode',
  [
    functools.partial(lib.decode_sparse, ALL),
    lib.decode_dense,
    functools.partial(lib.decode_dense, causal=False),
    lib.decode_jax,
  ],
  ids=['psa, all blocks', 'dense', 'dense, not causal', 'jax'],
)
def test_every_contender_decodes_the_last_query(decode):
  at = lib.cache(Shape(1024))
  got = decode(at.q, at)[0, 0, 0]
  np.testing.assert_allclose(got, exact(1024, 1023)[0], atol=2e-5)


def test_decoding_selects_sink_window_and_the_best_of_the_rest():
  at = lib.cache(Shape(2048))
  ids, counts = lib.select_for_decode(contenders.sparse(14), at.q, at)
  score = np.asarray(at.pooled.total)[0, 0] @ np.asarray(at.q)[0, 0, 0]
  near = set(range((2047 - contenders.WINDOW + 1) // 64, 32))
  free = [j for j in np.argsort(-score) if j not in near | {0}]
  want = near | {0} | set(free[: 14 - len(near) - 1])
  assert counts.tolist() == [[14]]
  assert set(np.asarray(ids)[0, 0].tolist()) == want


def test_passes_take_trees_and_what_has_no_gradient():
  seen = []

  def time(program, *args):
    seen.append(program(*args))
    return lambda calls: 0.0

  def function(x, y, factor):
    return factor * x['a'] * y

  inputs = {'a': np.float32(3)}, np.float32(5), np.float32(2)
  for call in passes(
    'f', function, lambda: inputs, lambda: (np.float32(7),), time
  ).values():
    call(1)
  out, pulled, (value, grads) = seen
  assert out == 105 and value == 210
  for x, y in (pulled, grads):
    assert (x['a'], y) == (70, 42)
