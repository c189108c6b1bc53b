"""A cached folder is complete or absent, whatever interrupts its making."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psa_jax.config import DataConfig, RunError
from psa_jax.data import cache

ROOT = Path(__file__).resolve().parents[2]


def load(path):
  try:
    first, second = (path / n for n in ('first', 'second'))
    text = first.read_text() + second.read_text()
  except OSError as e:
    raise cache.Damaged(str(e)) from e
  if text != 'good':
    raise cache.Damaged(f'{text!r}')
  return text


def build(path):
  (path / 'first').write_text('go')
  (path / 'second').write_text('od')


def forbidden(path):
  raise AssertionError(f'built again in {path}')


def drafts(parent):
  return list(parent.glob('.tmp-*'))


def run(code, *arguments):
  command = [sys.executable, '-c', code, *map(str, arguments)]
  return subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def test_builds_once(tmp_path):
  target = tmp_path / 'a' / 'set'
  assert cache.cached(target, build=build, load=load) == 'good'
  assert cache.cached(target, build=forbidden, load=load) == 'good'
  assert not drafts(target.parent)


@pytest.mark.parametrize('harm', ['changed', 'missing', 'empty', 'file'])
def test_damage_is_found_and_mended(tmp_path, harm):
  target = tmp_path / 'set'
  if harm == 'file':
    target.write_text('not a folder')
  else:
    cache.cached(target, build=build, load=load)
    (target / 'second').unlink()
    if harm == 'changed':
      (target / 'second').write_text('oD')
    if harm == 'empty':
      (target / 'first').unlink()
  assert cache.cached(target, build=build, load=load) == 'good'
  assert cache.cached(target, build=forbidden, load=load) == 'good'


def test_failed_build_leaves_nothing(tmp_path):
  def fail(path):
    build(path)
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    cache.cached(tmp_path / 'set', build=fail, load=load)
  assert not list(tmp_path.iterdir())


def test_killed_build_is_never_taken_for_finished(tmp_path):
  code = """
import os, signal, sys
from pathlib import Path
from psa_jax.data import cache
def build(path):
  (path / 'first').write_text('go')
  os.kill(os.getpid(), signal.SIGKILL)
cache.cached(Path(sys.argv[1]), build=build, load=None)
"""
  target = tmp_path / 'set'
  process = run(code, target)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert not target.exists()
  assert len(drafts(tmp_path)) == 1
  assert cache.cached(target, build=build, load=load) == 'good'


def test_leftovers_of_the_dead_are_removed_those_of_the_living_kept(tmp_path):
  old, new = tmp_path / '.tmp-old', tmp_path / '.tmp-new'
  for path in (old, new):
    path.mkdir()
    (path / 'file').write_text('x')
  past = time.time() - 2 * 24 * 3600
  os.utime(old, (past, past))
  cache.cached(tmp_path / 'set', build=build, load=load)
  assert drafts(tmp_path) == [new]


@pytest.mark.parametrize('damaged', [False, True])
def test_processes_that_build_at_once_agree(tmp_path, damaged):
  """All wait for each other inside `build`, so all try to publish."""
  code = """
import sys, time
from pathlib import Path
from psa_jax.data import cache
target, me = Path(sys.argv[1]), sys.argv[2]
def build(path):
  (target.parent / f'ready-{me}').touch()
  deadline = time.time() + 60
  while len(list(target.parent.glob('ready-*'))) < 3 and time.time() < deadline:
    time.sleep(0.001)
  for name in 'abcdef':
    (path / name).write_text(me)
def load(path):
  try:
    text = ''.join((path / name).read_text() for name in 'abcdef')
  except OSError as e:
    raise cache.Damaged(str(e))
  if len(text) != 6 or len(set(text)) != 1:
    raise cache.Damaged(text)
  return text[0]
print(cache.cached(target, build=build, load=load))
"""
  target = tmp_path / 'set'
  if damaged:
    target.mkdir()
    (target / 'a').write_text('1')
  processes = [run(code, target, i) for i in range(3)]
  results = [p.communicate() for p in processes]
  assert [p.returncode for p in processes] == [0, 0, 0], results
  assert all(out.strip() in '012' for out, _ in results)
  assert len({(target / name).read_text() for name in 'abcdef'}) == 1
  assert not drafts(tmp_path)


def test_unusable_place_is_one_clear_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(RunError, match='data.data_dir') as e:
    cache.cached(tmp_path / 'file' / 'set', build=build, load=load)
  assert '\n' not in str(e.value)


def test_data_dir_comes_from_config_environment_home(tmp_path, monkeypatch):
  monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / 'e'))
  assert cache.data_dir(DataConfig(data_dir='/x')) == Path('/x')
  assert cache.data_dir(DataConfig()) == tmp_path / 'e'
  monkeypatch.delenv(cache.ENVIRONMENT)
  assert cache.data_dir(DataConfig()) == Path.home() / '.cache' / 'psa_jax'
  assert cache.data_dir(DataConfig(data_dir='~/y')) == Path.home() / 'y'
