"""The rows of `results.jsonl`: one a run, one a measured cost."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.mechanisms.grid import Cell

Row = dict[str, Any]


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


def done(rows: Iterable[Row]) -> set[tuple]:
  """(cell, settings) of the runs that ended."""
  return {
    (cell_of(row), row['settings'])
    for row in rows
    if row['what'] == 'quality' and 'error' not in row
  }


def cell_of(row: Row) -> Cell:
  """The run that a row tells of."""
  return Cell(row['task'], row['arm'], row['seed'])


def newest(rows: Iterable[Row]) -> list[Row]:
  """Of every run and every cost the last row."""
  kept = {}
  for row in rows:
    kept[tuple(row.get(x) for x in ('what', 'task', 'arm', 'seed'))] = row
  return list(kept.values())
