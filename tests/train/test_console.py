"""What a user reads: lines, the bar, tables."""

import os
import sys

import pytest

from psa_jax.train import console as lib
from psa_jax.train import result as result_lib
from tests.train import tiny

ROW = {
  'kind': 'train',
  'step': 12,
  'stage': 1,
  'seq_len': 65536,
  'loss': 2.34567,
  'bits_per_byte': 3.2,
  'density': 0.0412,
  'gamma': 0.25,
  'tokens_per_second': 61234.5,
}
STAGE = {
  'seq_len': 1024,
  'compile_seconds': 2.5,
  'start': {'density': 1.0, 'seconds_per_step': 0.5},
  'end': {'density': 0.5, 'seconds_per_step': 0.25},
}
FOUND = {
  'bits_per_byte': 2.5,
  'density': 0.04,
  'windows': 4,
  'seq_len': 65536,
  'seconds_per_window': 1.5,
}
RESULT = {
  'name': 'lm',
  'step': 9,
  'mechanism': 'psa',
  'validation': {'psa': FOUND, 'dense': {**FOUND, 'density': 1.0}},
  'baselines': {'bigram': 3.5},
  'quality': 'bits_per_byte',
  'split': 'validation',
  'tokens': 123456,
  'train_seconds': 3725.0,
  'stages': [STAGE, {**STAGE, 'seq_len': 65536, 'compile_seconds': None}],
  'peak_memory_bytes': 2**30,
  'peak_memory_of': 'process',
}


def test_a_line_has_what_is_worth_a_glance(capsys):
  console = lib.open_console(260)
  console.show(ROW, eta=83.4)
  line = capsys.readouterr().out
  for part in (
    'step 12/260',
    'stage 2',
    '65,536 tokens',
    'loss 2.346',
    'density 4.1%',
    'gamma 0.25',
    'tok/s 61,23',
    'eta 1:23',
  ):
    assert part in line
  assert line.count('\n') == 1


def test_numbers_that_a_row_lacks_are_left_out(capsys):
  row = {**ROW, 'kind': 'eval', 'mechanism': 'dense', 'loss': None}
  del row['gamma']
  lib.open_console(260).show(row)
  line = capsys.readouterr().out
  assert 'eval at step 12/260' in line and 'dense attention' in line
  for absent in ('loss', 'gamma', ' bits ', 'eta'):
    assert absent not in line


def test_the_bits_of_quantised_training_are_shown(capsys):
  lib.open_console(260).show({**ROW, 'bits': 6.0}, eta=1.0)
  assert 'bits 6' in capsys.readouterr().out


@pytest.mark.parametrize('width', [60, 100, 160])
def test_a_terminal_shows_all_of_it_however_narrow(capsys, monkeypatch, width):
  monkeypatch.setattr('sys.stdout.isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', str(width))
  monkeypatch.setenv('TERM', 'xterm')
  console = lib.open_console(260)
  console.say('a line [with brackets]')
  console.show(ROW, eta=83.4)
  console.show({**ROW, 'kind': 'eval'})
  console.close()
  console.table('lm', [('name [of] it', '1')])
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'a line [with brackets]' in shown
  assert '12/260' in shown and '1:23' in shown and '61,23' in shown
  assert 'eval at step 12' in shown
  assert '[of]' in shown


def test_silence(capsys):
  console = lib.Silence()
  console.say('x')
  console.show(ROW, eta=1.0)
  console.table('x', [('a', 'b')])
  console.close()
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.0, '0:00'), (59.6, '1:00'), (3599.0, '59:59'), (3600.0, '1:00:00')],
)
def test_clock(seconds, text):
  assert lib.clock(seconds) == text


def test_the_table_of_a_run(capsys):
  lib.open_console(9).table('lm', result_lib.table(RESULT))
  lines = [
    ' '.join(line.split()) for line in capsys.readouterr().out.splitlines()
  ]
  for line in (
    'validation 4 windows of 65,536 tokens',
    'bits per byte, psa attention 2.5000',
    'density, dense attention 100.0%',
    'bits per byte, bigram, all validation text 3.5000',
    'density, start to end 100.0% -> 50.0%',
    'seconds per step, 65,536 tokens, start to end 0.500 -> 0.250',
    'compile seconds 2.5 + ?',
    'training time 1:02:05',
    'tokens seen 123,456',
    'peak memory (process) 1,024 MiB',
  ):
    assert line in lines, line


def test_the_ends_of_a_short_stage_are_other_steps():
  config = tiny.config()
  for logged, expected in (
    ([0.4, 0.3, 0.2, 0.1], ('start to end', '0.350 -> 0.150')),
    ([0.3, 0.2, 0.1], ('start to end', '0.300 -> 0.100')),
    ([0.4], ('seconds per step', '0.400')),
  ):
    rows = [
      {'kind': 'train', 'stage': 0, 'step': i + 1, 'seconds_per_step': seconds}
      for i, seconds in enumerate(logged)
    ]
    built = result_lib.build(
      config,
      rows=rows,
      validation={'dense': FOUND},
      baselines={},
      quality='bits_per_byte',
      seconds=1.0,
    )
    one = {**built, 'stages': built['stages'][:1]}
    found = [r for r in result_lib.table(one) if r[0].startswith('seconds per')]
    assert len(found) == 1 and found[0][1] == expected[1]
    assert found[0][0].endswith(expected[0])


def test_the_table_of_an_evaluation():
  rows = dict(result_lib.evaluation_table(RESULT))
  assert rows['seconds per window, psa'] == '1.500'
  assert rows['bits per byte, dense attention'] == '2.5000'


def test_peak_memory_is_at_least_what_is_in_use():
  size, what = result_lib.peak_memory()
  assert size > 50 * 2**20 and what


@pytest.mark.parametrize('kind', [lib._Lines, lib._Terminal])
def test_a_terminal_that_is_gone_ends_no_run(kind, monkeypatch):
  """Writes to it fail with EIO from then on."""
  master, slave = os.openpty()
  with os.fdopen(slave, 'w') as terminal:
    monkeypatch.setattr(sys, 'stdout', terminal)
    shown = kind(9)
    shown.say('before')
    os.close(master)
    for _ in range(2):
      shown.say('after')
      shown.show({'kind': 'train', 'step': 1, 'stage': 0, 'seq_len': 16})
      shown.table('title', [('a', 'b')])
    shown.close()
