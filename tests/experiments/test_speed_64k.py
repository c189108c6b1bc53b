"""The speed experiment runs, and times what it says it times."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.speed_64k import contenders as lib
from experiments.speed_64k import measurements, pipe, rows, tables
from experiments.speed_64k.timing import Unavailable

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*flags):
  done = subprocess.run(
    [sys.executable, 'experiments/speed_64k/run.py', '--nowrite', *flags],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done


def test_every_measurement_runs():
  """Without PyTorch, which costs one line however often it is asked for."""
  done = run(
    f'--what={",".join(measurements.MEASUREMENTS)}',
    '--lengths=1024',
    '--blocks=14',
    '--length=1024',
    '--repeats=1',
    '--peers=',
  )
  for line in (
    '| psa, 14 blocks | forward+backward |',
    '| psa kernel alone, 14 blocks | backward |',
    '| jax.nn.dot_product_attention | forward |',
    '| psa, 14 blocks | XLA temporaries |',
    '| psa_jax psa | forward |',
    '| 512 |',
  ):
    assert line in done.stdout
  assert done.stdout.count('whole train step') == 2
  assert done.stderr.count('make bench-peers') == 1


def test_the_page_shows_the_newest_results():
  """Tables and text between the markers are what results.jsonl gives."""
  page = (ROOT / 'experiments' / 'speed_64k' / 'README.md').read_text()
  found = tables.sections(rows.newest(rows.read()))
  assert found
  for name, text in found.items():
    assert f'<!-- {name} -->\n{text}\n<!-- /{name} -->' in page


def test_the_page_has_a_place_for_every_table():
  page = (ROOT / 'experiments' / 'speed_64k' / 'README.md').read_text()
  for name in ('targets', 'picture', *tables.TABLES):
    assert page.count(f'<!-- {name} -->') == 1, name


def test_lists_have_the_size_that_the_setting_names():
  made = lib.lists(4096, 24)
  tiles = np.arange(4096 // lib.BLOCK_Q)
  visible = 4 * (tiles + 1)
  np.testing.assert_array_equal(made.counts[0, 0], np.minimum(visible, 24))


@pytest.mark.parametrize('length, blocks', [(2048, 14), (1000, 14), (700, 14)])
def test_work_counts_pairs(length, blocks):
  """Against a count over a mask of all pairs."""
  made = lib.lists(length, blocks)
  ids, counts = np.asarray(made.ids)[0, 0], np.asarray(made.counts)[0, 0]
  mask = np.zeros((length, -(-length // lib.BLOCK_K) * lib.BLOCK_K), bool)
  for tile, (row, n) in enumerate(zip(ids, counts, strict=True)):
    for j in row[:n]:
      mask[
        tile * lib.BLOCK_Q : (tile + 1) * lib.BLOCK_Q,
        j * lib.BLOCK_K : (j + 1) * lib.BLOCK_K,
      ] = True
  work = lib.work(length, blocks)
  assert work.pairs_read == mask.sum()
  assert work.pairs_visible == np.tril(mask).sum()


def test_density_is_of_what_causal_attention_reads():
  work = lib.work(2048, 14)
  visible = 4 * np.arange(1, 9)
  kept = np.minimum(visible, 14).sum()
  assert work.density == pytest.approx(kept / visible.sum())
  assert work.share_of_square == pytest.approx(kept / (8 * 32))


def exact(T, q_from=0):
  q, k, v, _ = (np.asarray(x, np.float64) for x in lib.inputs(T))
  mask = np.tril(np.ones((T, T), bool))[q_from:]
  s = np.where(mask, q[0, q_from:, 0] @ k[0, :, 0].T / 8, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True) @ v[0, :, 0]


@pytest.mark.parametrize(
  'attend',
  [functools.partial(lib.attend_sparse, 16), lib.attend_dense, lib.attend_jax],
  ids=['psa, all blocks', 'dense', 'jax'],
)
def test_every_contender_computes_causal_attention(attend):
  q, k, v, _ = lib.inputs(1024)
  np.testing.assert_allclose(attend(q, k, v)[0, :, 0], exact(1024), atol=2e-5)


def test_the_kernel_alone_is_the_whole_operation_without_its_selection():
  q, k, v, grad = lib.inputs(1536)
  made = lib.lists(1536, 14)
  whole = lib.forward_and_backward(functools.partial(lib.attend_sparse, 14))
  alone = lib.forward_and_backward(lib.attend_listed)
  want = jax.jit(whole)(q, k, v, grad)
  got = jax.jit(alone)(q, k, v, grad, made.ids, made.counts)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_one_program_gives_the_gradients_of_the_two_passes():
  q, k, v, grad = lib.inputs(512)
  both = jax.jit(lib.forward_and_backward(lib.attend_dense))
  _, grads = both(q, k, v, grad)
  _, pullback = jax.vjp(lib.attend_dense, q, k, v)
  for got, want in zip(grads, pullback(grad), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  'decode',
  [functools.partial(lib.decode_sparse, 16), lib.decode_dense, lib.decode_jax],
  ids=['psa, all blocks', 'dense', 'jax'],
)
def test_every_contender_decodes_the_last_query(decode):
  got = decode(lib.cache(1024))[0, 0, 0]
  np.testing.assert_allclose(got, exact(1024, 1023)[0], atol=2e-5)


def test_decoding_selects_sink_window_and_the_best_of_the_rest():
  at = lib.cache(2048)
  ids, counts = lib.select_for_decode(14, at)
  score = np.asarray(at.pooled.total)[0, 0] @ np.asarray(at.q)[0, 0, 0]
  near = set(range((2047 - lib.WINDOW + 1) // lib.BLOCK_K, 32))
  free = [j for j in np.argsort(-score) if j not in near | {0}]
  want = near | {0} | set(free[: 14 - len(near) - 1])
  assert counts.tolist() == [[14]]
  assert set(np.asarray(ids)[0, 0].tolist()) == want


FAKE = """
import json, sys
print(json.dumps({'version': 'fake 1', 'sizes': 'none'}), flush=True)
for line in sys.stdin:
  request = json.loads(line)
  if request['T'] > 2:
    sys.exit(3)
  reply = {'seconds': request['T'] / 10}
  if request['T'] == 2:
    reply = {'error': "DefaultCPUAllocator: can't allocate memory: 9 bytes"}
  print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
  server = tmp_path / 'fake.py'
  server.write_text(FAKE)
  monkeypatch.setattr(pipe, 'SERVER', server)
  peer = pipe.Peer(pathlib.Path(sys.executable), 'sdpa', 8)
  yield peer
  peer.close()


def test_a_peer_that_fails_or_dies_says_why_and_answers_again(peer):
  assert peer.call('forward', 1)(1) == 0.1
  with pytest.raises(Unavailable, match='out of memory: more than 8 GiB'):
    peer.call('forward', 2)(1)
  with pytest.raises(Unavailable, match='PyTorch SDPA died, exit code 3'):
    peer.call('forward', 3)(1)
  assert peer.call('forward', 1)(1) == 0.1


def test_a_peer_that_cannot_start_costs_a_line(tmp_path, monkeypatch, capsys):
  server = tmp_path / 'fake.py'
  server.write_text('print(\'{"error": "No module named torch"}\')')
  monkeypatch.setattr(pipe, 'SERVER', server)
  assert pipe.start(sys.executable, 8, ('sdpa',)) == []
  assert 'No module named torch: run `make bench-peers`' in (
    capsys.readouterr().err
  )
