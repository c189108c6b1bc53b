"""The compilation cache of the command line: where, how large, and when not."""

import os
import pathlib
import subprocess
import sys

import pytest

from psa_jax import compile_cache

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_its_folder_is_its_own_and_bounded(tmp_path):
  values = compile_cache.settings({'PSA_JAX_CACHE_DIR': str(tmp_path)})
  folder = pathlib.Path(str(values['jax_compilation_cache_dir']))
  assert folder.parent == tmp_path and folder.name.startswith('compiled-')
  size = values['jax_compilation_cache_max_size']
  assert size == compile_cache.MAX_BYTES > 0


@pytest.mark.parametrize('variable', ['XDG_CACHE_HOME', 'HOME'])
def test_without_a_folder_it_is_the_users(variable, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  values = compile_cache.settings({variable: str(tmp_path)})
  folder = pathlib.Path(str(values['jax_compilation_cache_dir']))
  base = tmp_path if variable == 'XDG_CACHE_HOME' else tmp_path / '.cache'
  assert folder.parent == base / 'psa_jax'


def test_what_jax_is_told_by_its_variables_stays_as_it_is():
  assert not compile_cache.settings({'JAX_COMPILATION_CACHE_DIR': '/x'})
  values = compile_cache.settings({'JAX_COMPILATION_CACHE_MAX_SIZE': '5'})
  assert 'jax_compilation_cache_max_size' not in values
  assert 'jax_compilation_cache_dir' in values


def test_these_tests_never_write_to_the_users():
  """`conftest.py` sets JAX's variable, which takes precedence."""
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(ROOT / '.jax_cache')


# launch.py with a loop that compiles one function.
PROGRAM = """
import sys, types
import launch

def train(config, workdir, **options):
  import jax
  jax.jit(lambda x: jax.numpy.sin(x @ x).sum())(jax.numpy.ones((8, 8)))
  print(jax.config.jax_compilation_cache_max_size)

loop = types.ModuleType('psa_jax.train.loop')
loop.train_and_evaluate = train
sys.modules['psa_jax.train.loop'] = loop
sys.exit(launch.main(sys.argv))
"""


def launched(folder, *words):
  """Runs the program; returns what it printed and the files of its cache."""
  environ = {
    name: value for name, value in os.environ.items() if 'CACHE' not in name
  }
  environ['PSA_JAX_CACHE_DIR'] = str(folder)
  environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  recipe = ['--config=configs/lm_64k.py:quick', f'--workdir={folder}/run']
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, *recipe, *words],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environ,
  )
  assert done.returncode == 0, done.stderr
  return int(done.stdout), [*folder.glob('compiled-*/*-cache')]


@pytest.mark.tier('default')
def test_launch_keeps_programs_unless_it_is_told_not_to(tmp_path):
  size, files = launched(tmp_path, '--nocompile_cache')
  assert size != compile_cache.MAX_BYTES and not files
  size, files = launched(tmp_path)
  assert size == compile_cache.MAX_BYTES and files
