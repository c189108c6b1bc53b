"""The pipe to PyTorch: what fails says why, and is asked again."""

import pathlib
import sys

import pytest

from experiments.bench import peers
from experiments.bench.timing import Unavailable

pytestmark = pytest.mark.tier('default')

FAKE = """
import json, sys
print(json.dumps({'version': 'fake 1', 'sizes': 'none'}), flush=True)
for line in sys.stdin:
  request = json.loads(line)
  T = request.get('T', 1)
  if T > 2:
    sys.exit(3)
  reply = {'seconds': T / 10, 'bytes': len(line)}
  if T == 2:
    reply = {'error': "DefaultCPUAllocator: can't allocate memory: 9 bytes"}
  print(json.dumps(reply), flush=True)
"""
NO_TORCH = 'print(\'{"error": "No module named torch"}\')'


@pytest.fixture
def peer(tmp_path, monkeypatch):
  program = tmp_path / 'fake.py'
  program.write_text(FAKE)
  monkeypatch.setattr(peers, 'CPU_PROGRAM', [program])
  peer = peers.Peer(pathlib.Path(sys.executable), 'sdpa', 8)
  yield peer
  peer.close()


def test_a_peer_that_fails_or_dies_says_why_and_answers_again(peer):
  assert peer.call('forward', 1)(1) == 0.1
  with pytest.raises(Unavailable, match='out of memory: more than 8 GiB'):
    peer.call('forward', 2)(1)
  with pytest.raises(Unavailable, match='PyTorch SDPA died, exit code 3'):
    peer.call('forward', 3)(1)
  assert peer.call('forward', 1)(1) == 0.1
  assert peer.fields == {'version': 'fake 1', 'sizes': 'none'}


def test_growth_of_memory_is_a_number_or_a_reason(peer):
  assert peer.growth('forward', 1)['bytes'] == 0
  error = {'error': 'out of memory: more than 8 GiB'}
  assert peer.growth('forward', 2) == error


def test_a_peer_that_cannot_start_costs_a_line(tmp_path, monkeypatch, capsys):
  program = tmp_path / 'fake.py'
  program.write_text(NO_TORCH)
  monkeypatch.setattr(peers, 'CPU_PROGRAM', [program])
  with peers.started(sys.executable, 8, ('sdpa',)) as started:
    assert started == []
  assert 'No module named torch: run `make bench-peers`' in (
    capsys.readouterr().err
  )


def test_without_an_interpreter_there_are_none(capsys):
  peers.find.cache_clear()
  for _ in range(2):
    with peers.started('', 8) as started:
      assert started == []
  assert capsys.readouterr().err.count('make bench-peers') == 1
