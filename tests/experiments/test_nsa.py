"""The NSA experiment: its programs run, its tables judge as they say."""

import itertools

import pytest

from experiments.bench.passes import PASSES
from experiments.bench.peers import NAMES
from experiments.nsa import contenders as lib
from experiments.nsa import tables

pytestmark = pytest.mark.tier('default')

STAMP = dict(date='today', commit='abc', jax='1', python='3', machine='two')


def row(what, contender, which, length, **numbers):
  found = dict(what=what, contender=contender, length=length, **numbers)
  return {**found, 'pass': which, **STAMP}


def rows():
  medians = {'nsa': 2.0, 'nsa_tile': 6.0, lib.OURS_DENSE: 30.0}
  medians[NAMES['sdpa']] = 20.0
  found = [
    row('attention', name, which, length, median=median * length / 65_536)
    for (name, median), which, length in itertools.product(
      medians.items(), PASSES, (8192, 65_536)
    )
  ]
  ours, pip = lib.layer_name('nsa'), NAMES['nsa']
  found += [row('module', ours, 'forward', 4096, median=0.2)]
  found += [row('module', pip, 'forward', 4096, median=1.6)]
  found += [row('module', pip, 'backward', 4096, error='out of memory')]
  found += [row('peak', ours, PASSES[2], 4096, bytes=2**30)]
  return [*found, row('peak', pip, PASSES[2], 4096, bytes=9 * 2**30)]


def test_targets_are_against_the_fastest_dense_at_the_longest_length():
  text = tables.sections(rows())
  for line in (
    'nsa, 65,536 tokens, forward, against PyTorch SDPA | at least 5x | 10.0x '
    '| met',
    'nsa_tile, 65,536 tokens, backward, against PyTorch SDPA | at least 4x | '
    '3.3x | missed',
    'psa_jax nsa layer, 4,096 tokens, forward, against pip | at least 1x | '
    '8.0x | met',
    'over psa_jax nsa layer | at least 10x | 9.0x | missed',
  ):
    assert line in text['targets']
  assert text['targets'].count('against pip') == 1
  assert f'| {NAMES["nsa"]} | backward | out of memory |' in text['module']
  assert '| nsa | forward | 250 ms | 2 s |' in text['attention']


@pytest.mark.parametrize('branch', lib.BRANCHES)
def test_every_part_runs(branch):
  assert lib.branch_call(branch, 130, 2)(1) > 0


def test_all_contenders_are_there():
  found = lib.attention(130, 2)
  for name in (*lib.MECHANISMS, lib.OURS_DENSE):
    assert all((name, which) in found for which in PASSES)
  assert found['nsa', 'forward'](1) > 0
  assert found[lib.OURS_DENSE, 'forward'](1) > 0
