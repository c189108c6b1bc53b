"""The fuzz harness at random, for as long as one likes: `make soak MINUTES=n`.

  python -m tests.fuzz.soak --minutes=30
  python -m tests.fuzz.soak --part=files --seed=123 --count=1

Configurations and files in this process, killed runs in others beside it. Each
input comes from a seed; a fault is printed with the command that makes the same
input again. The last lines count what was tried and what was found; any fault
is exit code 1.
"""

import collections
import dataclasses
import pathlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import hypothesis

from psa_jax import command_line
from psa_jax.config.errors import line
from tests import conftest
from tests.fuzz import configs, files, kills

PARTS = ('configs', 'files', 'kills')
KINDS = ('wrong', 'lost', 'hang', 'traceback')
EXAMPLES = 100  # configurations of one seed


@dataclasses.dataclass
class Tally:
  """What was tried and what was found; filled by two threads."""

  tried: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  found: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def add(self, part: str, seed: int, count: int, faults: list[str]) -> None:
    """Counts one seed, and prints its faults with the way to repeat them."""
    with self.lock:
      self.tried[part] += count
      for fault in faults:
        self.found[fault.partition(':')[0].split()[0]] += 1
        print(
          f'{line(fault)}\n  python -m tests.fuzz.soak --part={part} '
          f'--seed={seed} --count=1',
          flush=True,
        )

  def lines(self) -> list[str]:
    """The counts in words."""
    tried = [f'{self.tried[part]:,} {part}' for part in PARTS]
    found = [f'{self.found[kind]} {kind}' for kind in KINDS]
    return [f'tried: {", ".join(tried)}', f'found: {", ".join(found)}']


def one_of_configs(seed: int) -> tuple[int, list[str]]:
  """`EXAMPLES` sets of overrides; the first fault, made as small as it gets."""
  faults: list[str] = []
  count = [0]

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=EXAMPLES, database=None, derandomize=False, deadline=None
  )
  @hypothesis.given(configs.cases())
  def run(overrides):
    count[0] += 1
    fault = configs.fault(overrides)
    faults[:] = [f'{fault} {overrides!r}'] if fault else faults
    assert fault is None

  try:
    run()
  except AssertionError:
    pass
  return count[0], faults


def one_of_files(folders: files.Folders, seed: int) -> tuple[int, list[str]]:
  """One file damaged and its folder used."""
  rng = random.Random(seed)
  action = rng.choice(files.ACTIONS)
  file, kind = rng.choice(files.READ[action]), rng.choice(files.DAMAGES)
  case = files.Case(file, kind, action, rng.randrange(10**6))
  fault = folders.fault(case)
  return 1, [fault] if fault else []


def one_of_kills(
  folder: pathlib.Path, right: kills.Whole, seed: int
) -> tuple[int, list[str]]:
  """One run that dies one to six times."""
  rng = random.Random(seed)
  moments = []
  for _ in range(rng.randint(1, 6)):
    if rng.random() < 0.8:
      moments.append(kills.Kill(touch=rng.randrange(right.touches)))
    else:
      moments.append(kills.Kill(seconds=rng.uniform(0, right.seconds)))
  try:
    outcome = kills.killed(folder, moments, right)
  finally:
    kills.clear(folder)
  return outcome.kills, outcome.faults


def parts(
  chosen: list[str], root: pathlib.Path
) -> dict[str, Callable[[int], tuple[int, list[str]]]]:
  """What makes an input of a seed, of each part that was asked for."""
  made: dict[str, Callable[[int], tuple[int, list[str]]]] = {}
  if 'configs' in chosen:
    made['configs'] = one_of_configs
  if 'files' in chosen:
    folders = files.Folders(root / 'files')
    made['files'] = lambda seed: one_of_files(folders, seed)
  if 'kills' in chosen:
    right = kills.whole(root / 'kills' / 'whole')
    made['kills'] = lambda seed: one_of_kills(root / 'kills/run', right, seed)
  return made


def soak(
  makers: dict, tally: Tally, seed: int, until: float, count: int | None
) -> None:
  """Seeds from `seed` on, the parts in turn, until the time or count is up."""
  done = 0
  while count is None or done < count:
    for part, make in makers.items():
      if count is None and time.monotonic() > until:
        return
      tally.add(part, seed, *make(seed))
    seed, done = seed + 1, done + 1


def main(argv: list[str] | None = None) -> int:
  """The command; 1 if there was a fault."""
  parser = command_line.Parser(
    prog='python -m tests.fuzz.soak', description='Fuzzes at random.'
  )
  parser.add_argument('--minutes', type=float, default=30)
  parser.add_argument('--part', choices=('all', *PARTS), default='all')
  parser.add_argument('--seed', type=int, default=None, help='default: random')
  parser.add_argument('--count', type=int, default=None, help='of seeds')
  options = parser.parse_args(argv)
  seed = options.seed
  if seed is None:
    seed = random.SystemRandom().randrange(10**6)
  chosen = list(PARTS) if options.part == 'all' else [options.part]
  began = time.monotonic()
  until = began + 60 * options.minutes
  tally = Tally()
  print(f'seeds from {seed} on', flush=True)
  with tempfile.TemporaryDirectory(prefix='psa_jax_soak_') as folder:
    makers = parts(chosen, pathlib.Path(folder))
    beside = {'kills': makers.pop('kills')} if len(makers) > 1 else {}
    words = (tally, seed, until, options.count)
    thread = threading.Thread(target=soak, args=(beside, *words))
    if beside:
      thread.start()
    soak(makers, *words)
    if beside:
      thread.join()
  minutes = (time.monotonic() - began) / 60
  print(f'{minutes:.1f} minutes from seed {seed} on')
  print('\n'.join(tally.lines()), flush=True)
  return 1 if tally.found else 0


if __name__ == '__main__':
  code = command_line.run(main)
  conftest.pytest_unconfigure()
  sys.exit(code)
