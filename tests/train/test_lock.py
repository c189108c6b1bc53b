"""Who may be in one work directory at once, among processes."""

import os
import re
import signal
import subprocess
import sys

import pytest

from psa_jax.config import ConfigError
from psa_jax.train import lock
from tests.conftest import ROOT

# Takes the locks it is told to, "folder mode alone", until the next line.
HOLDER = """
import contextlib, sys
from psa_jax.config import ConfigError
from psa_jax.train import lock
lock._PATIENCE = 0.2
for line in sys.stdin:
  with contextlib.ExitStack() as stack:
    try:
      folder, mode, alone = line.split()
      stack.enter_context(lock.hold(folder, mode, alone=alone == "True"))
      print("held", flush=True)
    except ConfigError as e:
      print(e, flush=True)
    sys.stdin.readline()
  print("free", flush=True)
"""


class Holder:
  """Another process."""

  def __init__(self):
    self.process = subprocess.Popen(
      [sys.executable, '-c', HOLDER],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def hold(self, folder, mode, *, alone):
    self._say(f'{folder} {mode} {alone}')
    return self.process.stdout.readline().rstrip()

  def free(self):
    self._say('')
    assert self.process.stdout.readline() == 'free\n'

  def _say(self, line):
    self.process.stdin.write(line + '\n')
    self.process.stdin.flush()


@pytest.fixture
def holder():
  holder = Holder()
  yield holder
  holder.process.kill()
  holder.process.communicate()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(lock, '_PATIENCE', 0.2)


def test_two_processes(holder, tmp_path):
  """The pairs of train, eval and export, and a kill -9 at the end."""
  alone = {'train': True, 'eval': False, 'export': False}
  for first, second in (
    *(('train', other) for other in alone),
    *((other, 'train') for other in ('eval', 'export')),
  ):
    with lock.hold(tmp_path, first, alone=alone[first]):
      refusal = holder.hold(tmp_path, second, alone=alone[second])
      holder.free()
    want = rf'--mode={first} on host \S+, process {os.getpid()}, since 20\d\d-'
    assert re.search(want, refusal), refusal
  with lock.hold(tmp_path, 'eval', alone=False):
    assert holder.hold(tmp_path, 'export', alone=False) == 'held'
    # Who comes then sees both; who went is not named.
    names = (tmp_path / lock.LOCK).read_text()
    assert names.count('\n') == 2
    holder.free()
  assert holder.hold(tmp_path, 'eval', alone=False) == 'held'
  with lock.hold(tmp_path, 'eval', alone=False):
    holder.free()
    assert holder.hold(tmp_path, 'train', alone=True).count('--mode=eval') == 2
    holder.free()
  assert holder.hold(tmp_path, 'train', alone=True) == 'held'
  with pytest.raises(ConfigError, match=f'process {holder.process.pid}, since'):
    with lock.hold(tmp_path, 'train', alone=True):
      pass
  holder.process.send_signal(signal.SIGKILL)
  holder.process.wait()
  with lock.hold(tmp_path, 'train', alone=True):
    assert f'"pid": {os.getpid()}' in (tmp_path / lock.LOCK).read_text()


def test_a_reader_needs_no_right_to_write(tmp_path, monkeypatch):
  """A work directory on a medium that is read-only is evaluated."""
  real = os.open

  def read_only(path, flags, *args, **kwargs):
    if flags & (os.O_WRONLY | os.O_RDWR):
      raise PermissionError(13, 'Permission denied', path)
    return real(path, flags, *args, **kwargs)

  monkeypatch.setattr(os, 'open', read_only)
  with lock.hold(tmp_path, 'eval', alone=False):
    assert not list(tmp_path.iterdir())
  monkeypatch.undo()
  (tmp_path / lock.LOCK).write_text('nonsense\n')
  monkeypatch.setattr(os, 'open', read_only)
  with lock.hold(tmp_path, 'eval', alone=False):
    pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
  def none(*args):
    raise OSError(37, 'No locks available')

  monkeypatch.setattr(lock.fcntl, 'lockf', none)
  said = []
  with lock.hold(tmp_path, 'train', alone=True, say=said.append):
    assert 'has no locks' in said[0]
