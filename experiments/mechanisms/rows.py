"""The rows of `results.jsonl`: one a run, one a measured cost."""

from collections.abc import Iterable

from experiments.grids import Row
from experiments.mechanisms.grid import Cell


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
