"""The rows of `results.jsonl`: written as they are measured, and read again.

A row says what was measured (`what`, `contender`, `arm`, ...), has numbers or
an `error`, and the machine, versions and commit that it was measured on.
"""

import datetime
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.bench import timing

ROOT = pathlib.Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def read(path: pathlib.Path) -> list[Row]:
  """All rows, oldest first; a last line that was cut off is left out."""
  if not path.exists():
    return []
  lines = path.read_text('utf-8').removesuffix('\n').split('\n')
  rows = []
  for number, line in enumerate(lines):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      if number < len(lines) - 1:
        raise
  return rows


def append(path: pathlib.Path, row: Mapping[str, Any]) -> None:
  """Adds a row, on a line of its own even behind one that was cut off."""
  text = path.read_text('utf-8') if path.exists() else ''
  if text and not text.endswith('\n'):
    path.write_text(text[: text.rfind('\n') + 1], 'utf-8')
  with path.open('a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')


def newest(
  rows: Iterable[Row], key: Sequence[str], *, one_commit: bool = False
) -> list[Row]:
  """The last row of each subject.

  Args:
    rows: oldest first.
    key: fields that name what a row is about; a field may be absent.
    one_commit: whether only rows of the latest commit of each `what` count,
      so that ratios are never of two versions.
  """
  rows = list(rows)
  commits = {row.get('what'): row['commit'] for row in rows}
  kept = {}
  for row in rows:
    if not one_commit or row['commit'] == commits[row.get('what')]:
      kept[subject(row, key)] = row
  return list(kept.values())


def subject(row: Mapping[str, Any], key: Sequence[str]) -> tuple:
  """What a row is about."""
  values = (row.get(name) for name in key)
  return tuple(tuple(x) if isinstance(x, list) else x for x in values)


class Book:
  """The rows of a run, and those that its file had before.

  Attributes:
    path: file that rows are appended to at once; None writes nothing.
    earlier: what the file held at the start, oldest first.
    rows: of this run, oldest first.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    key: Sequence[str],
    stamp: Mapping[str, str],
    *,
    resume: bool = False,
  ):
    """Starts a book.

    Args:
      path: see above.
      key: see `newest`.
      stamp: commit, versions and machine, for every row.
      resume: whether `has` counts earlier rows of the same commit.
    """
    began = datetime.datetime.now().isoformat(timespec='seconds')
    self.path, self._key = path, key
    self._stamp = {'began': began, **stamp}
    self.earlier = read(path) if path is not None else []
    self.rows: list[Row] = []
    # Those that this run goes on with.
    self._resumed = [
      row for row in self.earlier if resume and row['commit'] == stamp['commit']
    ]
    self._known = {subject(row, key) for row in self._resumed}

  def all(self) -> list[Row]:
    """Earlier rows and those of this run."""
    return self.earlier + self.rows

  def current(self) -> list[Row]:
    """The rows of this run and of those that it goes on with."""
    return self._resumed + self.rows

  def has(self, **fields: Any) -> bool:
    """Whether this subject was measured already."""
    return subject(fields, self._key) in self._known

  def add(self, row: Mapping[str, Any]) -> None:
    """Stamps a row with where and when, keeps it, and writes it."""
    load = round(os.getloadavg()[0], 2)
    row = {**row, **self._stamp, 'load': load}
    self.rows.append(row)
    self._known.add(subject(row, self._key))
    if self.path is not None:
      append(self.path, row)

  def sweep(
    self,
    contenders: Mapping[timing.Subject, timing.Call],
    *,
    most: int = timing.MOST,
    repeats: int = 0,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
  ) -> None:
    """Times what is not in the book yet, in turn, and adds a row for each.

    Args:
      contenders: by name and pass.
      most: as in `timing.interleave`.
      repeats: as in `timing.interleave`.
      about: further fields of a contender's rows.
      **fields: of every row; `what`, `length`, ...
    """
    missing = {
      (name, which): call
      for (name, which), call in contenders.items()
      if not self.has(**fields, contender=name, **{'pass': which})
    }
    timings = timing.interleave(missing, most, repeats)
    for (name, which), took in timings.items():
      row = {**fields, 'contender': name, 'pass': which, **took.row()}
      self.add({**row, **(about or {}).get(name, {})})
