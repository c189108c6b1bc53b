"""The command line: exit codes, one line for an error, and what it calls."""

import json
import pathlib
import subprocess
import sys

import pytest

import launch
from psa_jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = 'configs/lm_64k.py'
QUICK = f'--config={RECIPE}:quick'

# Runs launch.py's main; a mistake that has to wait for checkpoints and readers
# to be imported, or for a device, is an error of its own.
FAST = """
import sys
import launch
code = launch.main(sys.argv)
slow = {'orbax', 'grain', 'tensorflow_datasets'} & set(sys.modules)
assert not slow, slow
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
sys.exit(code)
"""

# The same with a training loop that only says how it was called, or fails.
FAKE_LOOP = """
import sys, types
import launch
from psa_jax.config import ConfigError, RunError

def call(name):
  def run(config, workdir, **options):
    print(name, config.name, workdir, options)
    raise_ = {action}
    if raise_:
      raise raise_
  return run

loop = types.ModuleType('psa_jax.train.loop')
loop.train_and_evaluate = call('train')
loop.evaluate_checkpoint = call('evaluate')
sys.modules['psa_jax.train.loop'] = loop
sys.exit(launch.main(sys.argv))
"""


def run(*words, program=FAST):
  return subprocess.run(
    [sys.executable, '-c', program, *map(str, words)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=60,
  )


def refused(*words):
  """The one line on stderr of a command that exits with 2."""
  done = run(*words)
  assert done.returncode == 2, done.stderr
  assert done.stdout == ''
  lines = done.stderr.splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith('error: ')
  return lines[0].removeprefix('error: ')


def with_loop(*words, action='None'):
  return run(*words, program=FAKE_LOOP.replace('{action}', action))


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    ([], 'no recipe; pass --config=file.py[:arg]'),
    (['--config='], 'no recipe; pass --config=file.py[:arg]'),
    (['--config'], 'Missing value for flag --config'),
    (['--config=configs/lm_46k.py'], 'did you mean configs/lm_64k.py?'),
    ([f'--config={RECIPE}:quik'], 'did you mean :quick?'),
    (['--confg=x.py'], 'unknown flag --confg; did you mean --config?'),
    ([QUICK, '--print-config'], 'did you mean --print_config?'),
    ([QUICK, '--mode=tain'], 'value should be one of <train|eval|export>'),
    ([QUICK, '--print_config=maybe'], 'print_config'),
    ([RECIPE], f'did you mean --config={RECIPE}?'),
    ([QUICK, 'train'], "unexpected argument 'train'"),
    ([QUICK, '--config.optim.lr=1'], 'did you mean config.optim.learning_rate'),
    ([QUICK, '--config.train.loss_chunk=1.5'], "expected an int, got '1.5'"),
    ([QUICK, '--config.optim.eps=None'], 'None is not a value'),
    ([QUICK, '--config.optim.eps'], '--config.optim.eps needs a value'),
    ([QUICK, '--noconfig.optim.eps'], '--no is for a bool'),
    ([QUICK, '--config.mesh=4'], 'config.mesh is a section'),
    ([QUICK, '--config.model.num_kv_heads=3'], 'multiple of'),
    ([QUICK, '--config.train.steps=0,1'], 'config.train.steps is (0, 1)'),
    (['--flagfile=absent.txt', QUICK], 'absent.txt'),
    ([QUICK, '--mode=eval', '--resume_from=3'], 'is for --mode=train'),
    ([QUICK, '--resume_from=-1'], 'resume_from'),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, text):
  assert text in refused(*words)


def test_a_task_that_does_not_fit_is_refused_before_anything_is_read(tmp_path):
  words = (QUICK, '--config.task=recall', f'--workdir={tmp_path}/run')
  done = with_loop(*words)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == (
    'error: config.task=recall reads questions, but config.data.source=sotu '
    'yields documents; set config.task=language_modeling\n'
  )


def test_the_real_script_refuses_too():
  done = subprocess.run(
    [sys.executable, 'launch.py', '--config=absent.py'],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: there is no recipe absent.py')
  assert done.stderr.count('\n') == 1


def test_a_recipe_that_fails(tmp_path):
  path = tmp_path / 'broken.py'
  path.write_text('def get_config():\n  return undefined\n')
  message = refused(f'--config={path}')
  assert message.startswith(f'{path} line 2: NameError')


def test_a_work_directory_that_cannot_be_used(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  assert f'{file} is a file' in refused(QUICK, f'--workdir={file}')
  assert 'train first' in refused(
    QUICK, f'--workdir={tmp_path}/absent', '--mode=eval'
  )


def test_a_run_with_another_configuration(tmp_path):
  saved = json.loads(run(QUICK, '--print_config').stdout)
  saved['optim']['learning_rate'] = 0.5
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  words = [QUICK, f'--workdir={tmp_path}']
  assert 'config.optim.learning_rate: 0.5 -> 0.003' in refused(*words)
  done = with_loop(*words, '--allow_config_change')
  assert done.returncode == 0, done.stderr
  assert "'allow_config_change': True" in done.stdout


def test_print_config_is_json_and_touches_nothing(tmp_path):
  done = run(
    QUICK,
    f'--workdir={tmp_path}/new',
    '--print_config',
    '--config.log.every=1e1',
    '--config.train.steps',
    '3,4',
    '--noconfig.eval.dense',
    '-config.model.scan_layers=0',
    '--config.log.tensorboard',
    '--config.mesh.data',
    '-1',
  )
  assert (done.returncode, done.stderr) == (0, '')
  config = json.loads(done.stdout)
  assert config['name'] == 'lm_64k_quick'
  assert config['log'] == {'every': 10, 'tensorboard': True}
  assert config['train']['steps'] == [3, 4]
  assert config['eval']['dense'] is False
  assert config['model']['scan_layers'] is False
  assert config['mesh']['data'] == -1
  assert list(tmp_path.iterdir()) == []


def test_a_flag_file_may_hold_overrides(tmp_path):
  file = tmp_path / 'flags.txt'
  file.write_text(f'{QUICK}\n--config.seed=7\n--print_config\n')
  done = run(f'--flagfile={file}')
  assert json.loads(done.stdout)['seed'] == 7


@pytest.mark.parametrize('word', ['--help', '-h', '--helpfull'])
def test_help_shows_flags_examples_and_every_key(word):
  done = run(QUICK, word)
  assert (done.returncode, done.stderr) == (0, '')
  for text in (
    'python launch.py --config=configs/lm_64k.py',
    '--workdir: ',
    '--config.optim.learning_rate=0.001',
    '--config.model.remat=none   (none | full | attention)',
    'Exit codes',
  ):
    assert text in done.stdout


def test_help_examples_are_valid():
  examples = [
    line.split()[2:]
    for line in (launch.__doc__ or '').splitlines()
    if line.strip().startswith('python launch.py')
  ]
  assert len(examples) >= 4
  for words in examples:
    if words[0].startswith('--config=runs/'):  # another command makes it
      continue
    done = run(*words, '--print_config')
    assert done.returncode == 0, (words, done.stderr)


def test_training_is_called_with_the_config_and_the_directory(tmp_path):
  done = with_loop(QUICK, f'--workdir={tmp_path}', '--config.name=mine')
  assert (done.returncode, done.stderr) == (0, '')
  options = {'allow_config_change': False, 'resume_from': None}
  assert done.stdout == f'train mine {tmp_path} {options}\n'


def test_evaluation_is_called_where_a_run_is(tmp_path):
  saved = run(QUICK, '--print_config').stdout
  (tmp_path / 'config.json').write_text(saved)
  done = with_loop(QUICK, f'--workdir={tmp_path}', '--mode=eval')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout == f'evaluate lm_64k_quick {tmp_path} {{}}\n'


@pytest.mark.parametrize(
  ('action', 'code', 'line'),
  [
    ("RunError('loss is\\nnan')", 1, 'error: loss is nan'),
    ("ConfigError('9 devices')", 2, 'error: 9 devices'),
    ("OSError(28, 'No space left', 'f')", 1, "No space left: 'f'"),
    ('KeyboardInterrupt()', 130, 'error: interrupted'),
    ('SystemExit(0)', 1, 'called sys.exit(0)'),
  ],
)
def test_a_failure_that_is_no_bug_is_one_line(tmp_path, action, code, line):
  done = with_loop(QUICK, f'--workdir={tmp_path}', action=action)
  assert done.returncode == code
  assert done.stderr.count('\n') == 1
  assert line in done.stderr


def test_a_bug_keeps_its_traceback(tmp_path):
  for action in ("ValueError('oops')", "FileNotFoundError(2, 'oops', 'f')"):
    done = with_loop(QUICK, f'--workdir={tmp_path}', action=action)
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    assert 'oops' in done.stderr


def test_split_overrides_keeps_the_rest_in_order():
  argv = ['--workdir=a', '--config.seed=1', '--config=f.py', '--config.seed=']
  left, overrides = launch.split_overrides(argv)
  assert left == ['--workdir=a', '--config=f.py']
  assert overrides == [('seed', '1'), ('seed', '')]
  value = '--config.name=a=b\nc'
  assert launch.split_overrides([value])[1] == [('name', 'a=b\nc')]


@pytest.mark.parametrize(
  'argv',
  [['--noconfig.eval.dense=1'], ['--noconfig.seed'], ['--config.seed']],
)
def test_split_overrides_refuses(argv):
  with pytest.raises(ConfigError):
    launch.split_overrides(argv)
