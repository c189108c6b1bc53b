"""Tables, targets and picture of the speed experiment, from made-up rows."""

import pytest

from experiments.bench import timing
from experiments.bench.passes import BOTH, PASSES
from experiments.bench.rows import Book
from experiments.speed_64k import contenders as lib
from experiments.speed_64k import measurements, plot, tables, targets
from experiments.speed_64k.__main__ import EXPERIMENT

pytestmark = pytest.mark.tier('default')

LENGTHS = (2048, 4096, 32_768, 65_536)
STAMP = dict(date='d', commit='c', jax='j', python='p', machine='m')


def test_a_length_after_one_without_memory_is_not_tried():
  def fails(calls):
    raise timing.Unavailable('out of memory: more than 8 GiB')

  book = Book(None, EXPERIMENT.key, STAMP)
  settings = measurements.SpeedSettings(blocks=(), repeats=1)
  for length, call in ((64, fails), (128, pytest.fail)):
    found = {('a', 'x'): call}
    measurements.sweep('decode', settings, book, length, found, [])
  assert book.rows[-1]['error'] == 'not tried: out of memory at 64 tokens'


def row(what, length, contender, which, **fields):
  return {
    'what': what,
    'length': length,
    'contender': contender,
    'pass': which,
    **fields,
    **STAMP,
  }


def timed(what, length, contender, which, seconds, **fields):
  return row(
    what, length, contender, which, seconds=[seconds], median=seconds, **fields
  )


def measured(ours=1.0):
  """Rows that meet every target by a little if `ours` is 1."""
  found = []
  for n in LENGTHS:
    for which, seconds in zip(PASSES, (1e-6, 2e-6, 3e-6), strict=True):
      sparse = {
        'blocks': 24,
        'pairs_read': 1000 * n,
        'pairs_visible': 900 * n,
        'head_dim': 64,
        'density': 0.05,
        'share_of_square': 0.025,
      }
      took = ours * seconds * n
      dense = seconds * n * n / 4000
      for name in (lib.whole(24), lib.kernel(24)):
        found.append(timed('lengths', n, name, which, took, **sparse))
      found.append(timed('lengths', n, lib.OURS_DENSE, which, dense))
      found.append(timed('lengths', n, targets.SDPA, which, dense * 1.1))
    # 4 x 64 x 900 flops a token forward in 1 us: 230 GFLOP/s.
    found.append(timed('lengths', n, lib.GEMM, 'forward', 17.18 / 460))
    found.append(timed('decode', n, lib.whole(24), 'decode', ours, blocks=24))
    found.append(timed('decode', n, lib.OURS_DENSE, 'decode', 16.0))
    found.append(row('peak', n, lib.whole(24), BOTH, bytes=n, of='temporaries'))
  return found


def test_targets_are_met_and_missed():
  names = [line.measured for line in targets.targets(measured())]
  assert names == [
    '16.4x (psa_jax dense)',
    '16.4x (psa_jax dense)',
    '16.0x (psa_jax dense)',
    '4,096 tokens',
    '56% (50% without what causality masks)',
    '2.00x',
    '1.10x',
    '1.10x',
  ]
  assert {line.verdict for line in targets.targets(measured())} == {'met'}
  slow = [line.verdict for line in targets.targets(measured(ours=2.0))]
  assert slow == ['missed'] * 5 + ['met'] * 3
  nothing = targets.targets([])
  assert {line.measured for line in nothing} == {'not measured'}


def test_crossover_needs_every_longer_length():
  found = measured()
  assert targets.crossover(found, 24) == 4096
  for r in found:
    if (r['length'], r['contender'], r['pass']) == (
      32_768,
      targets.SDPA,
      BOTH,
    ):
      r['median'] = 1e-9
  assert targets.crossover(found, 24) == 65_536
  assert targets.crossover(measured(ours=100.0), 24) is None


def test_tables_have_a_cell_for_each_length_and_say_what_failed():
  found = measured()
  error = 'out of memory: more than 8 GiB'
  found.append(row('lengths', 2048, 'nsa', 'forward', error=error))
  text = tables.sections(found)['lengths']
  head = '| contender | pass | 2,048 | 4,096 | 32,768 | 65,536 |'
  assert text.startswith(head)
  assert '| nsa | forward | out of memory |  |  |  |' in text
  assert f'nsa, forward, 2,048 tokens: {error}.' in text
  assert '| psa, 24 blocks | forward | 2.05 ms | 4.1 ms |' in text
  assert '5.0% of the blocks that causal attention reads' in text
  assert '56% (50%)' in text


def test_a_picture_is_drawn():
  figure = plot.draw(measured())
  assert [len(axis.lines) for axis in figure.axes] == [4, 2, 1]
  few = plot.draw([timed('decode', 64, 'a', 'decode', 1.0)])
  assert [len(axis.lines) for axis in few.axes] == [0, 0, 0]
