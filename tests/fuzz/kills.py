"""A tiny run killed at chosen moments, started again, and its end compared.

A moment is a place in the run's own work on its folder (the n-th file that it
opens, renames, makes or removes, in whichever thread) or a time. Children are
forked from a server that has imported everything, so a start costs a second or
two instead of five.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time

import jax

from psa_jax.config import EvalConfig, LogConfig
from psa_jax.train import loop, metrics
from psa_jax.train import run as run_lib
from psa_jax.train.checkpoint import Checkpoints
from tests.train import tiny

HANG_SECONDS = 300
_NEVER = 10**9
# What no two runs share.
TIMES = ('seconds_per_step', 'tokens_per_second', 'compile_seconds')
TIMES += ('seconds_per_window',)
# Audit events of Python for what changes a folder.
_EVENTS = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir')
_EVENTS += ('os.truncate', 'os.link', 'shutil.rmtree')


@dataclasses.dataclass(frozen=True)
class Kill:
  """When a run dies: at its n-th touch of its folder, or after some seconds."""

  touch: int | None = None
  seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
  """A run that nobody disturbed: what it ended with and what it took.

  Attributes:
    digest: see `digest`.
    touches: how often it touched its folder.
    seconds: from its start to its end.
  """

  digest: dict[str, str]
  touches: int
  seconds: float


@dataclasses.dataclass
class Outcome:
  """What came of a run that was killed and started again.

  Attributes:
    kills: how often it died before it reached its end.
    faults: a line for each; none if all is well. The first word is wrong,
      lost, hang or traceback.
  """

  kills: int
  faults: list[str]


def config():
  """Two stages, a checkpoint every second step, three evaluations."""
  found = tiny.config()
  model = dataclasses.replace(found.model, num_layers=1, d_model=8, mlp_dim=8)
  return dataclasses.replace(
    found,
    model=model,
    eval=EvalConfig(every=3, windows=2),
    log=LogConfig(tensorboard=False, every=1),
  )


def digest(folder: pathlib.Path) -> dict[str, str]:
  """What must be the same at the end of every run of `config`."""
  checkpoints = Checkpoints(folder / run_lib.CHECKPOINTS, read_only=True)
  arrays = hashlib.sha256()
  tree = checkpoints.read_arrays()
  for path, array in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path)
    arrays.update(f'{name} {array.dtype} {array.shape}'.encode())
    arrays.update(array.tobytes())
  rows = [
    {k: v for k, v in row.items() if k not in TIMES}
    for row in metrics.read_rows(folder / metrics.METRICS)
  ]
  result = json.loads((folder / 'result.json').read_text())['validation']
  for found in result.values():
    found.pop('seconds_per_window')
  return {
    'arrays': arrays.hexdigest(),
    'rows': json.dumps(rows),
    'validation': json.dumps(result),
  }


def whole(folder: pathlib.Path) -> Whole:
  """A run that nobody disturbs, in the same kind of process as the others."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  log = folder.with_name(f'{folder.name}.log')
  began = time.monotonic()
  code = _start(folder, log, Kill(touch=_NEVER))
  assert code == 0, log.read_text()
  seconds = time.monotonic() - began
  found = json.loads((folder / 'digest').read_text())
  return Whole(found, int((folder / 'touches').read_text()), seconds)


def killed(folder: pathlib.Path, kills: list[Kill], right: Whole) -> Outcome:
  """Runs, dies at each of `kills` in turn, ends, and is compared."""
  outcome = Outcome(0, [])
  for kill in [*kills, Kill()]:
    log = folder.with_name(f'{folder.name}.{outcome.kills}.log')
    newest = max(finished(folder), default=0)
    code = _start(folder, log, kill)
    text = log.read_text(errors='replace')
    outcome.faults += faults_of(code, text, newest)
    if code is None or code not in (0, -signal.SIGKILL):
      outcome.faults.append(f'traceback: exit code {code}: {text[-300:]!r}')
      return outcome
    if code == 0:
      break
    outcome.kills += 1
  found = json.loads((folder / 'digest').read_text())
  outcome.faults += [
    f'wrong: {name} differ from those of a run that was not killed'
    for name, value in right.digest.items()
    if found[name] != value
  ]
  return outcome


def faults_of(code: int | None, text: str, newest: int) -> list[str]:
  faults = []
  if code is None:
    faults.append(f'hang: nothing for {HANG_SECONDS} s')
  if 'Traceback' in text:
    faults.append(f'traceback: {text[-600:]!r}')
  began = re.search(r'going on from step (\d+)', text)
  trained = 'compiling' in text
  if newest and ((began and int(began[1]) < newest) or (trained and not began)):
    faults.append(f'lost: step {newest} was saved, but: {text[:200]!r}')
  return faults


def finished(folder: pathlib.Path) -> list[int]:
  """Steps of the checkpoints that a run may go on from."""
  found = (folder / run_lib.CHECKPOINTS).glob('*')
  return [int(path.name) for path in found if path.name.isdecimal()]


def _start(folder: pathlib.Path, log: pathlib.Path, kill: Kill) -> int | None:
  """The exit code of a run in a process of its own; None if it hangs."""
  process = _server().Process(target=_child, args=(folder, log, kill))
  process.start()
  process.join(HANG_SECONDS)
  if process.exitcode is None:
    process.kill()
    process.join()
    return None
  return process.exitcode


_lock = threading.Lock()


def _server():
  """The context whose server has imported what a run needs."""
  context = multiprocessing.get_context('forkserver')
  with _lock:
    context.set_forkserver_preload(['tests.fuzz.kills'])
  return context


def _child(folder: pathlib.Path, log: pathlib.Path, kill: Kill) -> None:
  with log.open('wb') as f:
    os.dup2(f.fileno(), 1)
    os.dup2(f.fileno(), 2)
  sys.stdout.reconfigure(line_buffering=True)
  folder.mkdir(parents=True, exist_ok=True)
  left = [_NEVER if kill.touch is None else kill.touch]
  _die_at_touch(str(folder.resolve()), left)
  if kill.seconds is not None:
    threading.Thread(
      target=_die_after, args=(kill.seconds,), daemon=True
    ).start()
  loop.train_and_evaluate(config(), folder, corpus=tiny.corpus())
  (folder / 'touches').write_text(str(_NEVER - left[0]))
  (folder / 'digest').write_text(json.dumps(digest(folder)))
  # As launch.py ends; a thread of a library must not hold it.
  sys.stdout.flush()


def _die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _die_after(seconds: float) -> None:
  time.sleep(seconds)
  _die()


def _die_at_touch(folder: str, left: list[int]) -> None:
  """Counts `left[0]` down at every touch of the folder; dies below 0."""

  def hook(event, args):
    if event not in _EVENTS or not args:
      return
    with contextlib.suppress(TypeError):  # an open file has no name here
      if folder in os.fsdecode(args[0]):
        left[0] -= 1
        if left[0] < 0:
          _die()

  sys.addaudithook(hook)


def clear(folder: pathlib.Path) -> None:
  """Removes a run and its logs."""
  shutil.rmtree(folder, ignore_errors=True)
  for log in folder.parent.glob(f'{folder.name}.*log'):
    log.unlink()
