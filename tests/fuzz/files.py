"""Every file of a work directory damaged, and the folder then used.

A folder is resumed, evaluated, exported, drawn, and the exported model
evaluated: in this process, with programs that are compiled once. What comes of
it is the numbers of the undamaged folder, with a word about what was left out,
or one refusal; anything else is a fault.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import pathlib
import random
import re
import shutil
import signal
import warnings

from absl import logging as absl_logging

from psa_jax import command_line, report
from psa_jax.config import recipe
from psa_jax.config.errors import line
from psa_jax.tasks import LanguageModel
from psa_jax.train import export, loop, metrics, workdir
from psa_jax.train import run as run_lib
from psa_jax.train import state as state_lib
from psa_jax.train import step as step_lib
from tests.fuzz import kills
from tests.train import tiny

ACTIONS = ('resume', 'eval', 'export', 'report', 'exported')
DAMAGES = (
  *(
    'flip',
    'flip',
    'flip',
    'flips',
    'digit',
    'digit',
    'cut',
    'empty',
    'nested',
  ),
  *('noise', 'twice', 'absent', 'folder', 'list', 'line', 'zeros'),
)
# What an action reads, or might.
_RECORD = ('config.json', 'data_manifest.json', 'environment.json')
_RECORD += ('command.txt', 'checkpoints/')
READ = {
  'resume': (*_RECORD, 'metrics.jsonl'),
  'eval': (*_RECORD, 'result.json'),
  'export': (*_RECORD, 'export/'),
  'report': ('metrics.jsonl', 'result.json', 'config.json'),
  'exported': ('export/config.json', 'export/model.safetensors'),
}
NESTED = b'{"a":' * 3000 + b'1' + b'}' * 3000
_HANG_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Case:
  """One input: what is done to which file, and how the folder is then used.

  Attributes:
    file: its path in the folder; a folder's path with a slash at its end
      stands for one of the files below, which the seed draws.
    damage: of `DAMAGES`.
    action: of `ACTIONS`.
    seed: of the place and content of the damage.
  """

  file: str
  damage: str
  action: str
  seed: int


class Folders:
  """A finished run with its export, what each use of it gives, and copies."""

  def __init__(self, root: pathlib.Path):
    self.config = kills.config()
    self.root = root
    self._corpus = tiny.corpus()
    whole = root / 'whole'
    with _warm(), _quiet():
      loop.train_and_evaluate(self.config, whole, corpus=self._corpus)
      loop.export_checkpoint(self.config, whole, corpus=self._corpus)
    self.digest = kills.digest(whole)
    self.rows = metrics.read_rows(whole / metrics.METRICS)
    self.files = sorted(
      str(path.relative_to(whole))
      for path in whole.rglob('*')
      if path.is_file()
    )
    self._right = {}
    for step in kills.finished(whole):
      one = self._copy(f'only{step}', resumable=False)
      for other in (one / run_lib.CHECKPOINTS).iterdir():
        if other.name != str(step):
          shutil.rmtree(other)
      for action in ('eval', 'export', 'exported'):
        with _warm(), _quiet():
          found, self._right[action, step] = self._do(action, one)
          assert found == step
    self.newest = max(kills.finished(whole))

  def fault(self, case: Case) -> str | None:
    """What is wrong with what comes of a case; None if all is well."""
    folder = self._copy('copy', resumable=case.action == 'resume')
    rng = random.Random(case.seed)
    below = [n for n in self.files if n.startswith(case.file)]
    name = rng.choice([n for n in below if (folder / n).exists()])
    damage(folder / name, case.damage, rng)
    said = io.StringIO()
    try:
      with _warm(), _quiet(said), _alarm():
        found = self._do(case.action, folder)
    except _Hang:
      return f'hang: {case.action} after {case.damage} of {name}'
    except Exception as e:
      if command_line.explained(e) is None:
        return (
          f'traceback: {case.action} after {case.damage} of {name}: '
          f'{type(e).__name__}: {line(e)}'
        )
      return None
    wrong = self._wrong(case.action, found, said.getvalue())
    return wrong and f'{wrong} ({case.action} after {case.damage} of {name})'

  def _do(self, action: str, folder: pathlib.Path):
    """Uses a folder as the command line does; returns its numbers."""
    config = self.config
    if action == 'resume':
      workdir.check(folder, config)
      loop.train_and_evaluate(config, folder, corpus=self._corpus)
      return kills.digest(folder)
    if action == 'eval':
      workdir.check(folder, config, must_exist=True)
      found = loop.evaluate_checkpoint(config, folder, corpus=self._corpus)
      return found['step'], _numbers(found)
    if action == 'export':
      workdir.check(folder, config, must_exist=True)
      target = loop.export_checkpoint(config, folder, corpus=self._corpus)
      files = [
        (target / n).read_bytes() for n in (export.WEIGHTS, 'config.json')
      ]
      digests = [hashlib.sha256(content).hexdigest() for content in files]
      return int(re.search(rb'"step":"(\d+)"', files[0])[1]), digests
    if action == 'exported':
      target = folder / export.FOLDER
      config = recipe.load_recipe(str(target / workdir.CONFIG))
      workdir.check(target, config, must_exist=True)
      found = loop.evaluate_checkpoint(config, target, corpus=self._corpus)
      return found['step'], _numbers(found)
    report.plot_run(folder, folder / 'run.svg')
    return report.read_rows(folder / metrics.METRICS)

  def _wrong(self, action: str, found, said: str) -> str | None:
    if action in ('eval', 'export', 'exported'):
      step, numbers = found
      if (action, step) not in self._right:
        return f'wrong: step {step}'
      if numbers != self._right[action, step]:
        return f'wrong: other numbers at step {step}'
      if step != self.newest and f'{self.newest}' not in said:
        return f'lost: step {step}, and no word of {self.newest}'
      return None
    rows = json.loads(found['rows']) if action == 'resume' else found
    right = json.loads(self.digest['rows']) if action == 'resume' else self.rows
    if any(row not in right for row in rows):
      return 'wrong: rows that were never written'
    if len(rows) < len(right) and metrics.METRICS not in said:
      return f'lost: {len(right) - len(rows)} rows, and no word of them'
    if action == 'resume':
      for name in ('arrays', 'validation'):
        if found[name] != self.digest[name]:
          return f'wrong: {name} differ'
    return None

  def _copy(self, name: str, *, resumable: bool) -> pathlib.Path:
    """A copy of the whole run, or of one that stopped before its last step."""
    folder = self.root / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(self.root / 'whole', folder)
    if resumable:
      (folder / 'result.json').unlink()
      newest = max(kills.finished(folder))
      shutil.rmtree(folder / run_lib.CHECKPOINTS / str(newest))
    return folder


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
  """Changes a file, as a disk, a person or an attacker might."""
  content = bytearray(path.read_bytes())
  place = rng.randrange(len(content)) if content else 0
  digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
  path.unlink()
  match kind:
    case 'absent':
      return
    case 'folder':
      path.mkdir()
      return
    case 'flip' if content:
      content[place] ^= 1 << rng.randrange(8)
    case 'flips':
      for _ in range(min(len(content), 20)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    case 'digit' if digits:
      place = rng.choice(digits)
      content[place] = ord('0') + (content[place] - ord('0') + 1) % 10
    case 'cut':
      del content[place:]
    case 'empty':
      content.clear()
    case 'nested':
      content[:] = NESTED
    case 'noise':
      content[:] = rng.randbytes(len(content))
    case 'zeros':
      content[place : place + 512] = bytes(len(content[place : place + 512]))
    case 'twice':
      content *= 2
    case 'list':
      content[:] = rng.choice(
        (b'[]', b'{}', b'null', b'1e999', b'"a"', b'{"a": NaN}', b'[{}]')
      )
    case 'line':
      lines = bytes(content).split(b'\n')
      lines[rng.randrange(len(lines))] = rng.choice(
        (b'', b'\n', b'{}', b'\xff', NESTED, b'{"step": "a"}')
      )
      content[:] = b'\n'.join(lines)
  path.write_bytes(bytes(content))


def _numbers(result) -> str:
  """What an evaluation found, without the times."""
  found = {
    name: {k: v for k, v in scores.items() if k not in kills.TIMES}
    for name, scores in result['validation'].items()
  }
  return json.dumps([found, result['baselines']], sort_keys=True)


class _Hang(BaseException):
  pass


@contextlib.contextmanager
def _alarm():
  """Ends what hangs; in the main thread only."""

  def ring(*_):
    raise _Hang

  before = signal.signal(signal.SIGALRM, ring)
  signal.alarm(_HANG_SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet(said: io.StringIO | None = None):
  """Collects what a run says, in whichever way."""
  said = said or io.StringIO()
  handler = logging.StreamHandler(said)
  logger = absl_logging.get_absl_logger()
  logger.addHandler(handler)
  try:
    with (
      contextlib.redirect_stdout(said),
      contextlib.redirect_stderr(said),
      warnings.catch_warnings(),
    ):
      warnings.simplefilter('ignore')
      yield
  finally:
    logger.removeHandler(handler)


_programs: dict = {}


@contextlib.contextmanager
def _warm():
  """Makes each program once: only files differ from case to case."""
  with contextlib.ExitStack() as stack:
    for module, name in (
      (state_lib, 'make_program'),
      (step_lib, 'make_train_step'),
      (step_lib, 'make_eval_step'),
    ):
      stack.enter_context(_remembered(module, name))
    yield


@contextlib.contextmanager
def _remembered(module, name):
  make = getattr(module, name)

  def once(*args, **options):
    key = (name, *(_key(a) for a in (*args, *options.values())))
    if key not in _programs:
      _programs[key] = make(*args, **options)
    return _programs[key]

  setattr(module, name, once)
  try:
    yield
  finally:
    setattr(module, name, make)


def _key(argument) -> str:
  """What tells two arguments apart; tasks are all of one kind."""
  if isinstance(argument, state_lib.Program):
    return repr(argument.config)
  if isinstance(argument, LanguageModel):
    return ''
  return repr(argument)
