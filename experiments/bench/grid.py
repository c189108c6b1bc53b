"""Grids of runs: arms x seeds, each run a process that trains one model.

A run prints a JSON object as its last line. Its row is added when it ends, so
a grid that is stopped goes on where it was: a run whose settings have not
changed is not made again. Seeds are the outermost loop, so a grid that was
stopped early has every arm with fewer seeds and not fewer arms.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.bench import cli
from experiments.bench.rows import ROOT, Book, Row
from experiments.bench.settings import Changes, GridSettings
from psa_jax import config as config_lib
from psa_jax.config import Config, ConfigError, RunError
from psa_jax.config.recipe import load_recipe

# A fork of this process to set it there might hang: JAX has threads.
_ON_CORE = (
  'import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); '
  'os.execv(sys.executable, [sys.executable, *sys.argv[2:]])'
)


class Run(NamedTuple):
  """One run of a grid; a grid of one task has none in its rows."""

  task: str
  arm: str
  seed: int

  def fields(self) -> Row:
    """Those of its row."""
    fields = self._asdict()
    return fields if self.task else {'arm': self.arm, 'seed': self.seed}

  def recipe(self, spec: str, changes: Changes | list) -> Config:
    """A recipe below the root, with this run's seed."""
    seed = ('seed', str(self.seed))
    return load_recipe(str(ROOT / spec), [seed, *changes])


@dataclasses.dataclass(frozen=True)
class Grid:
  """What is trained, and what is said of it.

  Attributes:
    experiment: name of its folder.
    what: kind of its rows.
    arms: task -> arms; the task '' where there is only one.
    configure: run and changes of its recipe -> its configuration.
    train: run and configuration -> the fields of its row.
    quality: what is printed of a row that has no error.
  """

  experiment: str
  what: str
  arms: Mapping[str, Sequence[str]]
  configure: Callable[[Run, Changes], Config]
  train: Callable[[Run, Config], Row]
  quality: Callable[[Row], str]

  def runs(self, settings: GridSettings) -> Iterator[Run]:
    """All runs, in the order in which they are made.

    Raises:
      ConfigError: there is no such task or arm.
    """
    names = {arm or 'default' for arms in self.arms.values() for arm in arms}
    for key, known in (('tasks', self.arms), ('arms', names)):
      for name in getattr(settings, key):
        if name not in known:
          raise ConfigError(
            f'--set {key}={name}: choose of {", ".join(sorted(known))}'
          )
    for seed in range(settings.seeds):
      for task in settings.tasks or self.arms:
        for arm in self.arms[task]:
          if not settings.arms or (arm or 'default') in settings.arms:
            yield Run(task, arm, seed)

  def of(self, row: Row) -> Run:
    """The run that a row tells of."""
    return Run(row.get('task', ''), row['arm'], row['seed'])

  def newest(self, rows: Sequence[Row]) -> list[Row]:
    """Of every run the last row, if its arm was not changed since.

    The seeds of an arm have the same settings: those of its last row count.
    """
    rows = [row for row in rows if row.get('what') == self.what]
    last = {self.of(row)._replace(seed=0): row.get('settings') for row in rows}
    kept = {}
    for row in rows:
      run = self.of(row)
      if row.get('settings') == last[run._replace(seed=0)]:
        kept[run] = row
    return list(kept.values())

  def fill(self, settings: GridSettings, book: Book) -> None:
    """Makes the runs that are missing; a row each, as they end."""
    wanted = {
      run: digest(self.configure(run, settings.changes))
      for run in self.runs(settings)
    }
    have = {
      (self.of(row), row.get('settings'))
      for row in book.all()
      if row.get('what') == self.what and 'error' not in row
    }
    todo = [run for run, hashed in wanted.items() if (run, hashed) not in have]
    print(
      f'{len(wanted) - len(todo)} runs of {len(wanted)} are there', flush=True
    )
    ended = each(todo, self._start(settings), workers=settings.workers)
    for number, (run, row) in enumerate(ended, 1):
      about = {'what': self.what, **run.fields(), 'settings': wanted[run]}
      book.add(about | row)
      result = row['error'] if 'error' in row else self.quality(row)
      name = ' '.join(map(str, run)).strip()
      print(
        f'{number}/{len(todo)} {name}: {result}, {row["seconds"]:.0f} s',
        flush=True,
      )

  def _start(self, settings) -> Callable[[Run, int], Row]:
    def start(run, core):
      words = ','.join(map(str, run))
      return process(cli.child_command(self.experiment, settings, words), core)

    return start

  def child(self, settings: GridSettings, words: str) -> Row:
    """One run, in the process that it has for itself."""
    try:
      task, arm, seed = words.split(',')
      run = Run(task, arm, int(seed))
    except ValueError:
      raise ConfigError(f'--child={words}: it takes task,arm,seed') from None
    return self.train(run, self.configure(run, settings.changes))


@contextlib.contextmanager
def trained(config: Config) -> Generator[tuple[dict[str, Any], pathlib.Path]]:
  """Result and work directory of a run by the project's trainer.

  Raises:
    RunError: it ended early.
  """
  from psa_jax.train import loop

  # What it prints goes to standard error; standard output is the answer's.
  with (
    tempfile.TemporaryDirectory() as name,
    contextlib.redirect_stdout(sys.stderr),
  ):
    folder = pathlib.Path(name)
    result = loop.train_and_evaluate(config, folder)
    if result.get('stopped'):
      raise RunError(
        f'a signal stopped the run at step {result["step"]}; the same command '
        'makes it again'
      )
    yield result, folder


def digest(config: Config) -> str:
  """A hash of all that is configured, but the seed and what is default.

  A key that the project gains later leaves it as it is. So does the task: it
  goes with the model and the source, and rows of before it had a name stay.
  """
  values, usual = (
    config_lib.flatten(config_lib.to_dict(x)) for x in (config, Config())
  )
  own = {
    path: value
    for path, value in values.items()
    if path not in ('seed', 'task') and value != usual[path]
  }
  text = json.dumps(own, sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:10]


def each(
  todo: Sequence[Any], start: Callable[[Any, int], Row], *, workers: int
) -> Iterator[tuple[Any, Row]]:
  """(run, its fields) as runs end; `seconds` among the fields.

  Args:
    todo: runs, started in this order.
    start: takes a run and the core that it is to use.
    workers: runs at a time.
  """
  cores = queue.SimpleQueue()
  available = sorted(os.sched_getaffinity(0))
  for number in range(workers):
    cores.put(available[number % len(available)])

  def one(item):
    core = cores.get()
    began = time.perf_counter()
    try:
      row = start(item, core)
    finally:
      cores.put(core)
    return item, row | {'seconds': time.perf_counter() - began}

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    waiting = [pool.submit(one, item) for item in todo]
    try:
      for made in concurrent.futures.as_completed(waiting):
        yield made.result()
    finally:  # an interrupted grid starts no more runs
      pool.shutdown(wait=False, cancel_futures=True)


def process(command: Sequence[str], core: int) -> Row:
  """The answer of a Python program on one core; an `error` if it failed.

  Args:
    command: what follows the interpreter, from the project's root.
    core: that it may use.
  """
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
    'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', 'cpu'),
  }
  done = subprocess.run(
    [sys.executable, '-c', _ON_CORE, str(core), *command],
    capture_output=True,
    text=True,
    env=environment,
    cwd=ROOT,
    check=False,
  )
  try:
    return json.loads(done.stdout.rstrip().split('\n')[-1])
  except (IndexError, json.JSONDecodeError):
    last = done.stderr.rstrip().split('\n')[-1]
    return {'error': last[:300] or f'exit {done.returncode}'}
