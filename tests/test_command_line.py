"""How programs end: one bounded line and an exit code for what is no bug."""

import errno
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

from psa_jax import command_line, sharding
from psa_jax import config as config_lib
from psa_jax.config import ConfigError, RunError
from psa_jax.config.errors import line
from psa_jax.train import console, loop, metrics
from tests.conftest import ROOT
from tests.fuzz import kills
from tests.train import tiny

LONG = 10_000


def ended(body, capsys):
  """Exit code and the one line of a program."""
  code = command_line.run(body)
  captured = capsys.readouterr()
  assert captured.err.count('\n') == 1 and captured.err.startswith('error: ')
  assert len(captured.err) < 3500
  return code, captured.err


def raising(error):
  def body():
    raise error

  return body


@pytest.mark.parametrize(
  ('error', 'code', 'text'),
  [
    (ConfigError('a\nb'), 2, 'a b\n'),
    (RunError('x' * LONG + ' then y'), 1, 'xxx... then y'),
    (OSError(errno.ENOSPC, 'No space left', 'f'), 1, "No space left: 'f'"),
    (MemoryError(), 1, 'lower config.train.batch_size'),
    (RuntimeError('RESOURCE_EXHAUSTED: 9 GB'), 1, 'out of memory: 9 GB'),
    (KeyboardInterrupt(), 130, 'interrupted'),
    (ConfigError('\x1b[2J \udcff'), 2, '\\x1b[2J \\udcff'),
  ],
)
def test_what_is_no_bug_is_one_line(error, code, text, capsys):
  found, shown = ended(raising(error), capsys)
  assert found == code and text in shown


def test_a_bug_is_raised():
  for error in (ValueError('oops'), OSError(errno.ENOENT, 'oops'), KeyError(1)):
    with pytest.raises(type(error)):
      command_line.run(raising(error))


def test_what_jax_says_of_memory_is_known(capsys):
  code, shown = ended(lambda: jnp.zeros(1 << 44).block_until_ready(), capsys)
  assert code == 1
  assert 'out of memory' in shown and 'config.model.remat=full' in shown
  keys = re.findall(r'config\.([\w.]+)', shown)
  assert len(keys) == 5
  for key in keys:
    config_lib.find_leaf(key)


@pytest.mark.parametrize('length', [LONG, 10**7])
def test_a_line_is_bounded(length):
  for text in ('x' * length, 'x ' * length, '\n' * length, '\udcff' * length):
    assert len(line(f'{text} end')) < 20_000
  assert line(f'key {"x" * LONG}; way out').endswith('...; way out') is False
  assert line(f'key {"x" * LONG} ; way out').endswith('... ; way out')


PROGRAMS = {
  'launch': 'launch.py',
  'experiment': '-m experiments.softmax',
  'experiments': '-m experiments',
  'report': '-m psa_jax.report',
  'prepare': '-m psa_jax.data.prepare',
}
# What is run in one process, for a start of Python costs seconds.
ALL = """
import contextlib, io, runpy, sys
for words in sys.stdin.read().split('\\n'):
  err = io.StringIO()
  sys.argv = words.split(' ')
  with contextlib.redirect_stderr(err):
    try:
      if sys.argv[0] == '-m':
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
      else:
        runpy.run_path(sys.argv[0], run_name='__main__')
      code = 0
    except SystemExit as e:
      code = e.code
  text = err.getvalue()
  assert code in (1, 2), (words[:200], code, text)
  assert text.startswith('error: ') and text.count('\\n') == 1, text
  assert len(text) < 3500 and 'Traceback' not in text, text
"""


@pytest.mark.tier('default')
def test_every_program_refuses_in_one_line(tmp_path):
  binary = tmp_path / 'binary'
  binary.write_bytes(bytes(range(256)))
  long = 'x' * LONG
  wrong = {
    'launch': [
      long,
      f'--{long}',
      f'--config={long}',
      f'--config=configs/lm_64k.py:{long}',
      f'--config=configs/lm_64k.py --mode={long}',
      f'--config=configs/lm_64k.py --workdir=/tmp/{long}',
      f'--config=configs/lm_64k.py --config.{long}=1',
      f'--config=configs/lm_64k.py --config.{"." * 10**5}=1',
      f'--config=configs/lm_64k.py --config.seed={"9" * LONG}',
      f'--config=configs/lm_64k.py --config.data.source={long}',
      f'--flagfile={binary}',
      f'--config={binary}',
      *(f'--config={spec}' for spec in ('::', ':', 'configs', '/', 'a:b:c')),
      '--config=configs/lm_64k.py:nonsense',
      '--config=configs/lm_64k.py::',
      '--config=psa_jax/types.py',
    ],
    'experiment': [
      '--set',
      '--set what',
      f'--set {long}=1',
      f'--set =1 --{long}',
      f'--set results={tmp_path}',
      f'--set results={tmp_path}/absent/rows',
      f'--nokey={long}',
    ],
    'experiments': ['--nokey', long],
    'report': ['', f'--plot={long}', long, '--nokey=1', f'{long} --plot=x.png'],
    'prepare': ['', '--nokey=1', f'--name={long}'],
  }
  commands = [
    f'{PROGRAMS[name]} {words}'.rstrip(' ')
    for name, many in wrong.items()
    for words in many
  ]
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', ALL],
    input='\n'.join(commands),
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.tier('default')
def test_a_closed_output_is_one_line():
  command = f'{sys.executable} launch.py --help'
  for shell, text in (
    (f'{command} >&-', 'standard output is closed'),
    (f'{command} >/dev/full', 'No space left on device'),
    (f'set -o pipefail; {command} | exec 0<&-', 'closed by its reader'),
  ):
    done = subprocess.run(
      ['bash', '-c', shell], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode in (1, 2), shell
    assert done.stderr.count('\n') == 1 and text in done.stderr, done.stderr


@pytest.mark.parametrize(
  ('variables', 'text'),
  [
    ({'COUNT': '2'}, 'JAX_NUM_PROCESSES is set, but not JAX_COORDINATOR'),
    ({'INDEX': '0'}, 'JAX_PROCESS_ID is set, but not JAX_COORDINATOR'),
    ({'COUNT': '2', 'INDEX': '0'}, 'but not JAX_COORDINATOR_ADDRESS;'),
    ({'ADDRESS': 'a:1', 'COUNT': '2'}, 'but not JAX_PROCESS_ID;'),
    ({'ADDRESS': 'a:1', 'INDEX': '0'}, 'but not JAX_NUM_PROCESSES;'),
    ({'ADDRESS': 'a:1', 'COUNT': '2', 'INDEX': '2'}, 'is not one of 0 to'),
    ({'ADDRESS': 'a:1', 'COUNT': 'x', 'INDEX': '0'}, 'is x'),
  ],
)
def test_half_set_variables_of_a_run_of_processes(variables, text, monkeypatch):
  names = {'ADDRESS': 'JAX_COORDINATOR_ADDRESS', 'COUNT': 'JAX_NUM_PROCESSES'}
  names['INDEX'] = 'JAX_PROCESS_ID'
  for name, value in variables.items():
    monkeypatch.setenv(names[name], value)
  with pytest.raises(ConfigError, match=re.escape(text)):
    sharding.initialize_distributed()


def test_a_wrong_platform_is_named(tmp_path):
  program = (
    'import jax; from psa_jax import command_line;'
    'raise SystemExit(command_line.run(jax.devices))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'JAX_PLATFORMS': 'gpux'},
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
  assert 'JAX_PLATFORMS=gpux cannot be used here' in done.stderr


@pytest.mark.tier('default')
def test_a_run_whose_lines_nobody_reads_saves_first(tmp_path, monkeypatch):
  """As with `| head`; the same command then goes on from there."""
  said, dropped = [], []

  class Pipe(console.Silence):
    def show(self, row, *, eta=None):
      said.append(row['step'])
      if not dropped:
        raise BrokenPipeError

  monkeypatch.setattr(console, 'open_console', lambda steps: Pipe())
  monkeypatch.setattr(command_line, 'drop_output', lambda: dropped.append(1))
  folder, config = tmp_path / 'run', kills.config()
  with pytest.raises(BrokenPipeError):
    loop.train_and_evaluate(config, folder, corpus=tiny.corpus())
  # Step 2 was under way when the line of step 1 was shown.
  assert (said, kills.finished(folder)) == ([1, 2], [2])
  loop.train_and_evaluate(config, folder, corpus=tiny.corpus())
  assert [r['step'] for r in metrics.read_rows(folder / 'metrics.jsonl')] == [
    *(1, 2, 3, 3, 4, 5, 6, 6, 7, 7)
  ]
