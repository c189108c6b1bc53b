"""Lists what is not locked: what an index could change under this project.

A requirement is locked by an exact version, and its file by a hash. What is
fetched while the program runs must have one, or a signature; the source of data
says which (`psa_jax/data/sources`, `Source.lock`). Ends with 1 where a
requirement has no version or something is fetched without a lock. The rest is
listed: a version without a hash, packages that others bring along, and those
that run code of their own when they are installed.
"""

import importlib.metadata
import pathlib
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]


def requirements(folder: pathlib.Path) -> list[tuple[str, str]]:
  """(file, requirement) of all requirements files and of the Makefile."""
  found = []
  for path in sorted(folder.glob('requirements*.txt')):
    for line in path.read_text('utf-8').split('\n'):
      if line.strip() and line[0] not in '#-':
        found.append((path.name, line.strip()))
  makefile = (folder / 'Makefile').read_text('utf-8').replace('\\\n', ' ')
  for command in re.findall(r'-m pip install(.*)', makefile):
    words = command.partition(' -r ')[0].split()
    words = [word for word in words if re.match(r'\w', word)]
    found += [('Makefile', word) for word in words]
  return found


def has_version(line: str) -> bool:
  """Whether a requirement is one exact version."""
  specifier = Requirement(line.partition(' --hash')[0]).specifier
  exact = [s.operator == '==' and '*' not in s.version for s in specifier]
  return exact == [True]


def brought_along(names: Iterable[str]) -> list[str]:
  """Installed packages that `names` ask for, directly or not, but not they."""
  named = {canonicalize_name(name) for name in names}
  todo, seen = set(named), {}
  while todo:
    name = todo.pop()
    try:
      distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # of another Python or another machine
    seen[name] = distribution.version
    for line in distribution.requires or ():
      requirement = Requirement(line)
      marker = requirement.marker
      if marker is None or marker.evaluate({'extra': ''}):
        todo.add(canonicalize_name(requirement.name))
    todo -= seen.keys()
  return [f'{n}=={seen[n]}' for n in sorted(seen.keys() - named)]


def sdists(folder: pathlib.Path) -> list[str]:
  """Packages that the Makefile lets pip build from source."""
  text = (folder / 'Makefile').read_text('utf-8')
  return re.findall(r'^SDISTS = (.*)$', text, re.MULTILINE)[0].split(',')


def fetched() -> dict[str, str]:
  """Sources of data that fetch -> what says that it is the right thing."""
  if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
  from psa_jax.data import sources

  return {s.name: s.lock for s in sources.every() if s.prepare}


def report(title: str, items: Iterable[str]) -> None:
  """Prints a list, or that it is empty."""
  items = list(items)
  print(f'{title}: {len(items) or "none"}')
  if items:
    text = textwrap.fill(', '.join(items), 78, break_on_hyphens=False)
    print(textwrap.indent(text, '  '))


def main() -> int:
  """Prints the lists; returns the exit code."""
  every = requirements(ROOT)
  loose = [f'{line} ({name})' for name, line in every if not has_version(line)]
  unhashed = [line for _, line in every if '--hash' not in line]
  names = [Requirement(line.partition(' --hash')[0]).name for _, line in every]
  build = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))
  locks = fetched()
  report('requirements without an exact version', loose)
  report('requirements with a version, without a hash', sorted({*unhashed}))
  report('brought along, without a version', brought_along(names))
  report('built from source, which runs their code', sdists(ROOT))
  report('ranges of pip install .', build['build-system']['requires'])
  unlocked = [name for name, lock in locks.items() if not lock]
  report('fetched at run time, without a lock', unlocked)
  for name, lock in sorted(locks.items()):
    print(f'  {name}: {lock or "NOT LOCKED"}')
  return 1 if loose or unlocked else 0


if __name__ == '__main__':
  sys.exit(main())
