"""Files that a pattern names, each real file once.

`*`, `?` and `[...]` stand for parts of a name and `**` for any folders, as in
Python's `glob`; a name that begins with a dot is matched only by a part that
does. A part with `[` that is the name of something in its folder means that
name and no set of letters.

Links are followed, to files and folders, also to those elsewhere. What several
names lead to (symbolic or hard links) is one file, under the name with the
fewest links in it, then the first. A folder is entered once for each part of
the pattern, so loops of links end.
"""

import contextlib
import fnmatch
import heapq
import os
import stat
from collections.abc import Generator, Hashable, Iterable, Iterator
from typing import NamedTuple

from psa_jax.config import ConfigError

_ANY_FOLDERS = '**'
_SPECIAL = frozenset('*?[')


class Found(NamedTuple):
  """A file: how many links its name crosses, the name, bytes and identity."""

  links: int
  path: str
  size: int
  identity: Hashable


def files(pattern: str) -> list[Found]:
  """Regular files that match, each once, sorted by path.

  Raises:
    ConfigError: a match, or a folder on the way, cannot be read, or a match is
      neither file nor folder.
  """
  found = (_file(links, path) for links, path in _matches(pattern))
  return once(file for file in found if file is not None)


def once(found: Iterable[Found]) -> list[Found]:
  """Each real file under one name, sorted by path."""
  kept: dict[Hashable, Found] = {}
  for file in sorted(found):
    kept.setdefault(file.identity, file)
  return sorted(kept.values(), key=lambda file: file.path)


def any_match(pattern: str) -> bool:
  """Whether anything at all matches, a folder for instance."""
  return next(_matches(pattern), None) is not None


@contextlib.contextmanager
def readable(path: str) -> Generator[None]:
  """Turns what the system says about `path` into a line for the user."""
  try:
    yield
  except OSError as e:
    raise ConfigError(
      f'data.source: cannot read {path!r}: {e.strerror or e}; mend it or leave '
      'it out of the pattern'
    ) from e


def _matches(pattern: str) -> Iterator[tuple[int, str]]:
  """(links crossed, path) of everything that matches, folders included.

  Places still to look at are taken in that order, so a folder is reached
  first by the name with the fewest links.
  """
  parts = [part for part in pattern.split('/') if part]
  places = [(0, '/' if pattern.startswith('/') else '', 0)]
  entered = set()
  while places:
    links, folder, at = heapq.heappop(places)
    if at == len(parts):
      yield links, folder
      continue
    with readable(folder or '.'):
      try:
        status = os.stat(folder or '.')
      except FileNotFoundError:
        continue  # a link that leads nowhere
      place = at, _identity(status, folder)
      if place in entered or not stat.S_ISDIR(status.st_mode):
        continue
      entered.add(place)
      last = at == len(parts) - 1
      if parts[at] != _ANY_FOLDERS:
        for step, path in _entries(folder, parts[at]):
          heapq.heappush(places, (links + step, path, at + 1))
        continue
      if not last:
        heapq.heappush(places, (links, folder, at + 1))
      for step, path in _entries(folder, '*'):
        if last:
          heapq.heappush(places, (links + step, path, at + 1))
        if os.path.isdir(path):
          heapq.heappush(places, (links + step, path, at))


def _entries(folder: str, part: str) -> Iterator[tuple[bool, str]]:
  """(whether it is a link, path) of what matches a part of a pattern."""
  names = [part]
  if _SPECIAL & set(part):
    listed = os.listdir(folder or '.')
    if '[' not in part or part not in listed:
      names = fnmatch.filter(listed, part)
      if not part.startswith('.'):
        names = [name for name in names if not name.startswith('.')]
  for name in names:
    path = os.path.join(folder, name)
    try:
      status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
      continue
    yield stat.S_ISLNK(status.st_mode), path


def _file(links: int, path: str) -> Found | None:
  """A match that is a file; None where it is a folder."""
  with readable(path):
    status = os.stat(path)
  if stat.S_ISDIR(status.st_mode):
    return None
  if not stat.S_ISREG(status.st_mode):
    raise ConfigError(
      f'data.source: {path!r} is neither a file nor a folder; leave it out of '
      'the pattern'
    )
  return Found(links, path, status.st_size, _identity(status, path))


def _identity(status: os.stat_result, path: str) -> Hashable:
  """The same for all names of a file; some file systems number none."""
  if status.st_ino:
    return status.st_dev, status.st_ino
  return os.path.realpath(path)
