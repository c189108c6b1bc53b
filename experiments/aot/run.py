"""Compiles the kernels for real TPUs and GPUs, none of which has to be there.

  make aot                                      compare with golden.json
  make aot ARGS=--update                        rewrite it and the tables
  make aot ARGS='--machines=v5e --only=dense'   a part

`make aot` sets up an environment of its own with the compilers: libtpu, the
CUDA plugin and ptxas. The table of kernels and machines is `cases.py`. What is
recorded is exact under one set of versions, so any difference is reported, and
the exit code is 1 if there is one.
"""

import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from experiments.aot import cases, child, compare, table  # noqa: E402

_UPDATE = flags.DEFINE_bool('update', False, 'Record what is found.')
_MACHINES = flags.DEFINE_list(
  'machines', list(cases.MACHINES), 'Machines to compile for.'
)
_ONLY = flags.DEFINE_string('only', '', 'Part of the names of cases to try.')
_JOBS = flags.DEFINE_integer('jobs', 2, 'Machines at a time.', lower_bound=1)

GOLDEN = HERE / 'golden.json'
PAGES = (HERE / 'README.md', ROOT / 'psa_jax' / 'kernels' / 'README.md')
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


def main(argv):
  """Compiles, then compares or records; returns the exit code."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  unknown = set(_MACHINES.value) - set(cases.MACHINES)
  if unknown:
    raise app.UsageError(
      f'unknown machines {sorted(unknown)}; choose from {[*cases.MACHINES]}'
    )
  golden = {'versions': versions(), 'results': {}}
  if GOLDEN.exists():
    golden = json.loads(GOLDEN.read_text())
  whole = not _ONLY.value and set(_MACHINES.value) == set(cases.MACHINES)
  if _UPDATE.value and not whole and golden['versions'] != versions():
    raise app.UsageError('these are other versions: record all, not a part')
  now = {'versions': versions(), 'results': compile_all()}
  return update(golden, now) if _UPDATE.value else check(golden, now)


def versions() -> dict[str, str]:
  """Of everything that the numbers depend on.

  Raises:
    SystemExit: a compiler is missing.
  """
  try:
    return {name: importlib.metadata.version(name) for name in COMPILERS}
  except importlib.metadata.PackageNotFoundError as error:
    raise SystemExit(f'{error.name} is missing; run `make aot`') from error


def compile_all() -> compare.Results:
  """Machine -> case -> what was found."""
  with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
    found = pool.map(compile_for, _MACHINES.value)
    return dict(zip(_MACHINES.value, found, strict=True))


def compile_for(name: str) -> dict[str, dict]:
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
        [sys.executable, HERE / 'child.py', name, folder, _ONLY.value],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
      )
      if (folder / 'rows.json').exists():
        rows = json.loads((folder / 'rows.json').read_text())
      if ended.returncode == 0:
        return rows
  raise RuntimeError(f'{name}: the compiler ended:\n{ended.stderr[-2000:]}')


def chosen(results: compare.Results) -> compare.Results:
  """The part of recorded results that this run looks at."""
  return {
    machine: {k: v for k, v in rows.items() if _ONLY.value in k}
    for machine, rows in results.items()
    if machine in _MACHINES.value
  }


def check(golden, now) -> int:
  """Prints the differences; 1 if there are any."""
  same = golden['versions'] == now['versions']
  if not same:
    print(
      f'{GOLDEN.name} was made with other versions, so that only what compiles '
      f'is compared.\n  recorded: {golden["versions"]}\n  here: '
      f'{now["versions"]}'
    )
  old = chosen(golden['results'])
  lines = compare.differences(old, now['results'], numbers=same)
  print('\n'.join(lines) or 'nothing changed')
  if lines:
    print('if that is meant: make aot ARGS=--update')
  return bool(lines)


def update(golden, now) -> int:
  """Records what was found, and renews the tables."""
  from psa_jax import report

  looked_at, results = chosen(golden['results']), {}
  for machine in cases.MACHINES:
    old, new = (x['results'].get(machine, {}) for x in (golden, now))
    gone = looked_at.get(machine, {}).keys() - new.keys()
    # What is renewed keeps its place, so that the change is a small one.
    results[machine] = {k: v for k, v in old.items() if k not in gone} | new
  text = json.dumps({**now, 'results': results}, indent=1)
  GOLDEN.write_text(text + '\n')
  shown = table.text(results, now['versions'])
  for page in PAGES:
    report.replace_section(page, 'aot', shown)
  return 0


if __name__ == '__main__':
  app.run(main)
