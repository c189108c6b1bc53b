"""Rounds, rows, tables, targets and picture of the speed experiment."""

import json

import pytest

from experiments.speed_64k import contenders as lib
from experiments.speed_64k import (
  measurements,
  plot,
  rows,
  run,
  tables,
  targets,
  timing,
)

BOTH = targets.BOTH
LENGTHS = (2048, 4096, 32_768, 65_536)
STAMP = {'date': 'd', 'commit': 'c', 'jax': 'j', 'machine': 'm'}


def test_contenders_take_turns():
  order = []

  def contender(name, seconds):
    def call(calls):
      order.append((name, calls))
      return seconds

    return call

  found = timing.interleave(
    {('a', 'x'): contender('a', 5.0), ('b', 'x'): contender('b', 10.0)}
  )
  # A warm-up round, then four rounds of 5 s and three of 10 s.
  assert order == [(name, 1) for name in 'ababababa']
  assert found['a', 'x'].row() == {'seconds': [5.0] * 4, 'median': 5.0}


def test_long_calls_get_fewer_rounds_and_short_ones_several_calls():
  assert timing.rounds_for(0.1, 9) == 9
  assert timing.rounds_for(5.0, 9) == 4
  assert timing.rounds_for(15.0, 9) == 3
  assert timing.rounds_for(88.0, 9) == 1
  asked = []

  def short(calls):
    asked.append(calls)
    return 0.002

  timing.interleave({('a', 'x'): short}, repeats=2)
  assert asked == [1, 1, 10, 10]


def test_one_that_fails_is_a_row_and_the_rest_goes_on():
  def fails(calls):
    raise timing.Unavailable('out of memory: more than 8 GiB')

  found = timing.interleave(
    {('a', 'x'): fails, ('b', 'x'): lambda calls: 3.0}, repeats=2
  )
  assert found['a', 'x'].row() == {'error': 'out of memory: more than 8 GiB'}
  assert found['b', 'x'].row() == {'seconds': [3.0, 3.0], 'median': 3.0}


@pytest.fixture
def results(tmp_path, monkeypatch):
  path = tmp_path / 'results.jsonl'
  monkeypatch.setattr(rows, 'RESULTS', path)
  return path


def test_rows_are_written_as_they_are_found(results):
  book = rows.Book(results)
  book.add({'what': 'decode', 'length': 8})
  (row,) = rows.read(results)
  assert row['what'] == 'decode'
  assert {'commit', 'date', 'jax', 'machine', 'python', 'load'} <= set(row)


def sweep(book, contenders, length):
  settings = measurements.Settings(
    lengths=(length,),
    blocks=(),
    repeats=1,
    python='',
    peer_gib=8,
    quadratic_gib=1,
    length=0,
    recipe='',
  )
  measurements._sweep('decode', settings, book, length, contenders, [])


def test_resume_skips_what_this_commit_has(results):
  asked = []

  def contender(name):
    return lambda calls: asked.append(name) or 3.0

  sweep(rows.Book(results), {('a', 'x'): contender('a')}, 64)
  old = {**rows.read(results)[0], 'contender': 'b', 'commit': 'another'}
  with results.open('a') as file:
    file.write(json.dumps(old) + '\n')
  asked.clear()
  both = {('a', 'x'): contender('a'), ('b', 'x'): contender('b')}
  sweep(rows.Book(results, resume=True), both, 64)
  assert set(asked) == {'b'}
  sweep(rows.Book(results), both, 64)
  assert set(asked) == {'a', 'b'}


def test_a_length_after_one_without_memory_is_not_tried(results):
  def fails(calls):
    raise timing.Unavailable('out of memory: more than 8 GiB')

  book = rows.Book(results)
  sweep(book, {('a', 'x'): fails}, 64)
  sweep(book, {('a', 'x'): pytest.fail}, 128)
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
    for which, seconds in zip(lib.PASSES, (1e-6, 2e-6, 3e-6), strict=True):
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


def test_the_newest_commit_of_each_measurement_counts():
  found = [
    {**timed('decode', 64, 'a', 'decode', 1.0), 'commit': 'old'},
    {**timed('decode', 64, 'b', 'decode', 1.0), 'commit': 'old'},
    {**timed('peak', 64, 'a', BOTH, 1.0), 'commit': 'old'},
    {**timed('decode', 64, 'a', 'decode', 2.0), 'commit': 'new'},
    {**timed('decode', 64, 'a', 'decode', 3.0), 'commit': 'new'},
  ]
  assert [(r['what'], r['median']) for r in rows.newest(found)] == [
    ('peak', 1.0),
    ('decode', 3.0),
  ]


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


def test_the_page_is_made_with_its_picture(tmp_path):
  page = tmp_path / 'README.md'
  names = ('targets', 'picture', *tables.TABLES)
  page.write_text('\n'.join(f'<!-- {n} -->\n<!-- /{n} -->' for n in names))
  run.render(page, measured())
  assert '16.4x' in page.read_text() and '(speed.png)' in page.read_text()
  assert (tmp_path / 'speed.png').stat().st_size > 10_000


def test_a_picture_of_little_can_be_drawn(tmp_path):
  plot.draw([timed('decode', 64, 'a', 'decode', 1.0)], tmp_path / 'a.png')
  assert (tmp_path / 'a.png').exists()
