"""The rows of `results.jsonl`: written as they are found, and found again.

A row is what was measured (`what`, `length`, `contender`, `pass`, and either
numbers or an `error`) with the machine, versions and commit it was found on.
"""

import datetime
import functools
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from psa_jax import report

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / 'results.jsonl'
# What a result depends on; the run itself writes other files of this folder.
SOURCES = ['psa_jax', 'configs', ':(glob)experiments/speed_64k/*.py']

Row = dict[str, Any]


def key(row: Row) -> tuple:
  """What a row is about."""
  return tuple(row.get(x) for x in ('what', 'length', 'contender', 'pass'))


def read(path: pathlib.Path | None = None) -> list[Row]:
  """All rows of a file (`RESULTS`), oldest first; none if there is no file."""
  path = RESULTS if path is None else path
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text('utf-8').splitlines()]


def newest(rows: Iterable[Row]) -> list[Row]:
  """Of each measurement the rows of its latest commit, one for a subject."""
  rows = list(rows)
  commits = {row['what']: row['commit'] for row in rows}
  kept = {}
  for row in rows:
    if row['commit'] == commits[row['what']]:
      kept[key(row)] = row
  return list(kept.values())


class Book:
  """The rows of this run, and of earlier ones that it goes on with.

  Attributes:
    rows: oldest first.
  """

  def __init__(self, path: pathlib.Path | None, *, resume: bool = False):
    """Starts a book.

    Args:
      path: file that rows are appended to at once; None writes nothing.
      resume: whether rows in `RESULTS` of the same commit count as measured.
    """
    self.path = path
    self.rows = []
    if resume:
      commit = environment()['commit']
      self.rows = [row for row in read() if row['commit'] == commit]
    self._known = {key(row) for row in self.rows}

  def has(
    self, what: str, length: int, contender: str | None, which: str | None
  ) -> bool:
    """Whether this was measured already."""
    return (what, length, contender, which) in self._known

  def add(self, row: Row) -> None:
    """Stamps a row with where and when, keeps it, and writes it."""
    row = {**row, **environment(), 'load': round(os.getloadavg()[0], 2)}
    self.rows.append(row)
    self._known.add(key(row))
    if self.path is not None:
      with self.path.open('a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')


@functools.cache
def environment() -> Row:
  """Start, commit, versions and machine of this run's results."""
  began = datetime.datetime.now().isoformat(timespec='seconds')
  return {'began': began, **report.provenance(ROOT, SOURCES)}
