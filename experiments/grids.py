"""What grids of runs share: rows in a file, hashes of settings, processes.

A run is a process on one core that prints a JSON object as its last line. A
row is appended to `results.jsonl` when its run ends, so a grid that is stopped
goes on where it was.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from psa_jax import config_dict
from psa_jax.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
Row = dict[str, Any]
# A fork of this process to set it there might hang: JAX has threads.
_ON_CORE = (
  'import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); '
  'os.execv(sys.executable, [sys.executable, *sys.argv[2:]])'
)


def read(path: pathlib.Path) -> list[Row]:
  """All rows, oldest first; a last line that was cut off is left out."""
  if not path.exists():
    return []
  lines = path.read_text('utf-8').splitlines()
  found = []
  for number, line in enumerate(lines):
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      if number < len(lines) - 1:
        raise
  return found


def append(path: pathlib.Path, row: Mapping[str, Any]) -> None:
  """Adds a row, on a line of its own even behind one that was cut off."""
  text = path.read_text('utf-8') if path.exists() else ''
  if text and not text.endswith('\n'):
    path.write_text(text[: text.rfind('\n') + 1], 'utf-8')
  with path.open('a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')


def caption(rows: Sequence[Row]) -> str:
  """Where the numbers come from."""
  commits = ' '.join(dict.fromkeys(row['commit'] for row in rows))
  last = rows[-1]
  return (
    f'{last["date"]}, commit {commits}, jax {last["jax"]}, python '
    f'{last["python"]}, machine {last["machine"]}.'
  )


def settings(config: Config) -> str:
  """A hash of all that is configured, but the seed and what is default.

  A key that the project gains later leaves it as it is. So does the task: it
  goes with the model and the source, and rows of before it had a name stay.
  """
  values, usual = (
    config_dict.flatten(config_dict.to_dict(x)) for x in (config, Config())
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
  """(run, what it found) as they end; `seconds` among it.

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


def fill(
  results: pathlib.Path,
  wanted: Mapping[Any, str],
  start: Callable[[Any, int], Row],
  *,
  have: Collection[tuple[Any, str]],
  workers: int,
  stamp: dict[str, str],
  what: str,
  say: Callable[[Row], str],
) -> None:
  """Makes the runs of a grid that are missing; a row each, as they end.

  Args:
    results: file of the rows.
    wanted: run (a named tuple) -> hash of its settings.
    start: as in `each`.
    have: (run, settings) that are there.
    workers: runs at a time.
    stamp: where the numbers come from.
    what: kind of row.
    say: what is printed of a row that has no error.
  """
  todo = [run for run, hashed in wanted.items() if (run, hashed) not in have]
  print(
    f'{len(wanted) - len(todo)} runs of {len(wanted)} are there', flush=True
  )
  for number, (run, row) in enumerate(each(todo, start, workers=workers), 1):
    whole = {'what': what, **run._asdict(), 'settings': wanted[run]}
    append(results, whole | row | stamp)
    name = ' '.join(map(str, run))
    found = row['error'] if 'error' in row else say(row)
    print(
      f'{number}/{len(todo)} {name}: {found}, {row["seconds"]:.0f} s',
      flush=True,
    )


def starter(
  file: str, changes: Sequence[str] = ()
) -> Callable[[Any, int], Row]:
  """`start` for `each`: a program with `--cell=` and `--set=`.

  Args:
    file: the program.
    changes: of every run, KEY=VALUE.
  """
  more = [f'--set={change}' for change in changes]

  def start(run, core):
    return process(file, [f'--cell={",".join(map(str, run))}', *more], core)

  return start


def process(file: str, arguments: Sequence[str], core: int) -> Row:
  """What a Python program on one core found; an `error` if it failed."""
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
    'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', 'cpu'),
  }
  done = subprocess.run(
    [sys.executable, '-c', _ON_CORE, str(core), file, *arguments],
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  try:
    return json.loads(done.stdout.splitlines()[-1])
  except (IndexError, json.JSONDecodeError):
    said = done.stderr.strip().splitlines()
    return {'error': said[-1][:300] if said else f'exit code {done.returncode}'}
