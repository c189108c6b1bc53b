"""Compiles the kernels for real TPUs and GPUs, none of which has to be there.

  make aot                                      compare with golden.json
  make aot ARGS='--set update=true'             rewrite it and the tables
  make aot ARGS='--set machines=v5e --set only=dense'    a part

`make aot` sets up an environment of its own with the compilers: libtpu, the
CUDA plugin and ptxas. The table of kernels and machines is `cases.py`. What is
recorded is exact under one set of versions, so any difference is reported, and
the exit code is 1 if there is one.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from experiments.aot import cases, child, compare, table
from experiments.bench import cli
from experiments.bench.experiment import Experiment
from experiments.bench.rows import ROOT
from experiments.bench.settings import Settings, option
from psa_jax.config import ConfigError

GOLDEN = ROOT / 'experiments' / 'aot' / 'golden.json'
PAGES = ('experiments/aot/README.md', 'psa_jax/kernels/README.md')
COMPILERS = (
  'jax',
  'jaxlib',
  'libtpu',
  'jax-cuda13-plugin',
  'jax-cuda13-pjrt',
  'nvidia-cuda-nvcc',
  'nvidia-nvvm',
  'nvidia-cuda-runtime',
)


@dataclasses.dataclass(frozen=True)
class AotSettings(Settings):
  """What `--set` changes."""

  update: bool = option(False, 'Record what is found.')
  machines: tuple[str, ...] = option(
    tuple(cases.MACHINES), 'Machines.', choices=tuple(cases.MACHINES)
  )
  only: str = option('', 'Part of the names of cases to try.')
  jobs: int = option(2, 'Machines at a time.', least=1)


def run(settings, book) -> int:
  """Compiles, then compares or records; returns the exit code."""
  del book  # one file of golden numbers takes the place of rows
  golden = {'versions': versions(), 'results': {}}
  if GOLDEN.exists():
    golden = read()
  whole = not settings.only and set(settings.machines) == set(cases.MACHINES)
  if settings.update and not whole and golden['versions'] != versions():
    raise ConfigError('these are other versions: record all, not a part')
  now = {'versions': versions(), 'results': compile_all(settings)}
  if settings.update:
    return update(settings, golden, now)
  return check(settings, golden, now)


def read():
  """What is recorded."""
  return json.loads(GOLDEN.read_text())


def versions() -> dict[str, str]:
  """Of everything that the numbers depend on.

  Raises:
    ConfigError: a compiler is missing.
  """
  try:
    return {name: importlib.metadata.version(name) for name in COMPILERS}
  except importlib.metadata.PackageNotFoundError as error:
    raise ConfigError(f'{error.name} is missing; run `make aot`') from error


def compile_all(settings) -> compare.Results:
  """Machine -> case -> what was found."""
  compile_one = functools.partial(compile_for, only=settings.only)
  with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
    rows = pool.map(compile_one, settings.machines)
    return dict(zip(settings.machines, rows, strict=True))


def compile_for(name: str, only: str) -> dict[str, dict]:
  """What is found for one machine, in as many processes as it takes.

  Raises:
    RuntimeError: a process ended without doing any case.
  """
  settings = ('JAX_', 'XLA_', 'LIBTPU_', 'TPU_', 'MOSAIC_')
  ours = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
  with tempfile.TemporaryDirectory(prefix='psa_jax_aot_') as place:
    folder = pathlib.Path(place)
    env = ours | child.environment(cases.MACHINES[name], folder)
    rows, done = {}, -1
    while len(rows) > done:
      done = len(rows)
      ended = subprocess.run(
        [sys.executable, '-m', 'experiments.aot.child', name, folder, only],
        env=env,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
      )
      if (folder / 'rows.json').exists():
        rows = json.loads((folder / 'rows.json').read_text())
      if ended.returncode == 0:
        return rows
  raise RuntimeError(f'{name}: the compiler ended:\n{ended.stderr[-2000:]}')


def chosen(settings, results: compare.Results) -> compare.Results:
  """The part of recorded results that this run looks at."""
  return {
    machine: {k: v for k, v in rows.items() if settings.only in k}
    for machine, rows in results.items()
    if machine in settings.machines
  }


def check(settings, golden, now) -> int:
  """Prints the differences; 1 if there are any."""
  same = golden['versions'] == now['versions']
  if not same:
    print(
      f'{GOLDEN.name} was made with other versions, so that only what compiles '
      f'is compared.\n  recorded: {golden["versions"]}\n  here: '
      f'{now["versions"]}'
    )
  old = chosen(settings, golden['results'])
  lines = compare.differences(old, now['results'], numbers=same)
  print('\n'.join(lines) or 'nothing changed')
  if lines:
    print("if that is meant: make aot ARGS='--set update=true'")
  return bool(lines)


def update(settings, golden, now) -> int:
  """Records what was found, and renews the tables."""
  looked_at, results = chosen(settings, golden['results']), {}
  for machine in cases.MACHINES:
    old, new = (x['results'].get(machine, {}) for x in (golden, now))
    gone = looked_at.get(machine, {}).keys() - new.keys()
    # What is renewed keeps its place, so that the change is a small one.
    results[machine] = {k: v for k, v in old.items() if k not in gone} | new
  text = json.dumps({**now, 'results': results}, indent=1)
  GOLDEN.write_text(text + '\n')
  EXPERIMENT.write_pages()
  return 0


EXPERIMENT = Experiment(
  name='aot',
  about='do the kernels compile for real TPUs and GPUs, and did that get worse',
  settings=AotSettings(),
  quick=AotSettings(machines=('v5e',), only='topk'),
  run=run,
  load=read,
  sections=lambda golden: {
    'aot': table.text(golden['results'], golden['versions'])
  },
  pages=PAGES,
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
