"""Paths as users write them, and the one place that reads `~`."""

import json
import os
import pathlib
import pwd
import subprocess
import sys

import pytest

from psa_jax import compile_cache
from psa_jax.config import ConfigError, DataConfig, TrainConfig, paths, recipe
from psa_jax.data import cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
BAD = {
  '~nosuchuser/x': "there is no user nosuchuser; write it as './~nosuchuser/x",
  '/a\0b': 'holds a NUL character',
  'runs/a\udcff': 'is not UTF-8; choose another path',
}


@pytest.fixture
def homeless(monkeypatch):
  """A user without an entry in the table of users, and without HOME."""

  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  monkeypatch.delenv('HOME')


def test_a_path_is_what_it_says(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  for path in ('', 'a', './~b', '/a/~/b', 'ä', pathlib.Path('c')):
    assert paths.expanded(path, 'key') == os.fspath(path)
  assert paths.expanded('~', 'key') == str(tmp_path)
  assert paths.expanded('~/a', 'key') == f'{tmp_path}/a'
  root = pwd.getpwuid(0)
  assert paths.expanded(f'~{root.pw_name}/a', 'key') == f'{root.pw_dir}/a'


# Where a path comes in -> how it is called there.
PLACES = {
  'DataConfig.data_dir': lambda path: DataConfig(data_dir=path),
  'DataConfig.source': lambda path: DataConfig(source=f'files:{path}'),
  'TrainConfig.init_from': lambda path: TrainConfig(init_from=path),
  '--config': lambda path: recipe.load_recipe(f'{path}.py'),
  '$PSA_JAX_CACHE_DIR': lambda path: compile_cache.settings(
    {'PSA_JAX_CACHE_DIR': path}
  ),
}


@pytest.mark.parametrize('key', PLACES)
@pytest.mark.parametrize('path', BAD)
def test_a_bad_path_is_one_line_wherever_it_comes_in(key, path):
  with pytest.raises(ConfigError) as e:
    PLACES[key](path)
  message = str(e.value)
  assert message.startswith(f'{key}: ') and BAD[path] in message
  assert message.isascii() and message.isprintable()


def test_no_home_is_one_line_where_it_is_needed(homeless, monkeypatch):
  monkeypatch.delenv(cache.ENVIRONMENT, raising=False)
  for home in (None, ''):
    if home is not None:
      monkeypatch.setenv('HOME', home)  # `~/x` would be `/x`
    for call, way in (
      (lambda: paths.expanded('~/x', 'key'), 'write the path without ~'),
      (lambda: cache.data_dir(DataConfig()), r'data_dir or \$PSA_JAX_DATA_DIR'),
      (lambda: compile_cache.settings({}), r'\$PSA_JAX_CACHE_DIR'),
    ):
      with pytest.raises(ConfigError, match='there is no home folder') as e:
        call()
      assert e.match(way)
  # What does not need one goes on.
  assert cache.data_dir(DataConfig(data_dir='/d')) == pathlib.Path('/d')


def test_the_variable_of_the_data_is_named(monkeypatch):
  monkeypatch.setenv(cache.ENVIRONMENT, '~nosuchuser')
  with pytest.raises(ConfigError, match=r'^\$PSA_JAX_DATA_DIR: .*no user'):
    cache.data_dir(DataConfig())


# One process for all command lines; the first word sets a variable.
COMMANDS = """
import json, os, sys
import launch
from psa_jax.data import prepare
for variable, command, *words in json.loads(sys.argv[1]):
  name, _, value = variable.partition('=')
  os.environ[name] = value
  main = prepare.main if command == 'prepare' else launch.main
  words = words if command == 'prepare' else ['launch.py', *words]
  print(main(words), file=sys.stderr)
  del os.environ[name]
"""


@pytest.mark.tier('default')
def test_a_command_with_a_bad_path_makes_nothing(tmp_path):
  """It made a folder of that name, ran in it and ended with 0."""
  bad, recipe_flag = '~nosuchuser/x', f'--config={ROOT}/configs/lm_64k.py:quick'
  commands = [
    ('A=', 'launch', recipe_flag, f'--workdir={bad}'),
    ('A=', 'launch', recipe_flag, '--workdir=a\udcff'),
    ('A=', 'launch', '--config=~nosuchuser/x.py'),
    ('A=', 'launch', '--config=~nosuchuser/x.json', '--mode=eval'),
    ('A=', 'launch', recipe_flag, f'--config.data.data_dir={bad}'),
    ('A=', 'launch', recipe_flag, f'--config.data.source=files:{bad}'),
    ('A=', 'launch', recipe_flag, f'--config.train.init_from={bad}'),
    (f'PSA_JAX_CACHE_DIR={bad}', 'launch', recipe_flag, '--workdir=w'),
    ('A=', 'prepare', '--name=sotu', f'--data_dir={bad}'),
    (f'PSA_JAX_DATA_DIR={bad}', 'prepare', '--name=sotu'),
  ]
  environment = {
    key: value
    for key, value in os.environ.items()
    if key != 'JAX_COMPILATION_CACHE_DIR'
  }
  done = subprocess.run(
    [sys.executable, '-c', COMMANDS, json.dumps(commands)],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=environment | {'PYTHONPATH': str(ROOT)},
    timeout=120,
  )
  assert done.stdout == '' and not list(tmp_path.iterdir()), done.stderr
  lines = done.stderr.strip().split('\n')
  assert lines[1::2] == ['2'] * len(commands), done.stderr
  for line in lines[::2]:
    assert line.startswith('error: ')
    assert 'there is no user nosuchuser' in line or 'is not UTF-8' in line
