"""The tables of the page, from the rows."""

import statistics
from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.rows import Row
from experiments.bench.tables import Table
from experiments.mechanisms import grid
from psa_jax import report

TITLES = {
  'text': 'bits per byte, 8,192 bytes',
  'mqar': 'MQAR accuracy',
  'needle': 'needle accuracy',
}


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{marker in the page: text} of everything that was measured."""
  texts = {}
  for name, what, table in (
    ('quality', 'quality', quality),
    ('recall', 'quality', recall),
    ('cost', 'cost', costs),
  ):
    mine = [row for row in rows if row['what'] == what]
    if mine:
      text = report.markdown(table(mine))
      texts[name] = lib.paragraphs(text, *failures(mine), lib.caption(mine))
  return texts


def quality(rows: Sequence[Row]) -> Table:
  """Mean and spread of the seeds by arm and task, controls first."""
  table: Table = [
    ('attention', *TITLES.values(), 'density, text', 'peak memory, text')
    + ('seeds',)
  ]
  for arm in grid.ARMS:
    mine = [row for row in rows if row['arm'] == arm]
    if not mine:
      continue
    numbers = [values(mine, task, 'quality') for task in grid.TASKS]
    shown = [
      spread(x, percent=task != 'text')
      for x, task in zip(numbers, grid.TASKS, strict=True)
    ]
    density = spread(values(mine, 'text', 'density'), percent=True)
    peak = max(values(mine, 'text', 'peak_bytes'), default=0)
    peak = f'{peak / 2**20:,.0f} MiB' if peak else '-'
    seeds = ' '.join(str(len(x)) for x in numbers)
    table.append((name(arm), *shown, density, peak, seeds))
  return table


def recall(rows: Sequence[Row]) -> Table:
  """MQAR by the distance of the fact, mean of the seeds."""
  mine = [row for row in rows if row['task'] == 'mqar' and 'by' in row]
  labels = [x[0] for x in mine[0]['by']['distance']] if mine else []
  table: Table = [('attention', *labels, 'density')]
  for arm in grid.ARMS:
    runs = [row for row in mine if row['arm'] == arm]
    if not runs:
      continue
    by = [dict((x[0], x[2]) for x in row['by']['distance']) for row in runs]
    shown = [
      f'{100 * statistics.mean(x[label] for x in by):.0f} %' for label in labels
    ]
    density = spread(values(runs, 'mqar', 'density'), percent=True)
    table.append((name(arm), *shown, density))
  return table


def costs(rows: Sequence[Row]) -> Table:
  """Times beside dense attention's in the same run, keys and memory."""
  at = {row['arm']: row for row in rows if 'error' not in row}
  table: Table = [
    (
      'attention',
      'forward, of dense',
      'forward and backward, of dense',
      'keys read a query',
      'temporary memory, of dense',
    )
  ]
  for arm in grid.ARMS:
    if arm not in at or 'dense' not in at:
      continue
    row, dense = at[arm], at['dense']
    table.append(
      (
        name(arm),
        *(
          f'{1000 * row[x]:.0f} ms, {row[x] / dense[x]:.2f}'
          for x in ('forward', 'both')
        ),
        f'{row["keys"]:,.0f}',
        f'{row["temporary_bytes"] / dense["temporary_bytes"]:.2f}',
      )
    )
  return table


def failures(rows: Sequence[Row]) -> list[str]:
  """What did not come to its end, and why."""
  return sorted(
    {
      f'{row["arm"]}, {row.get("task", "cost")}, seed {row.get("seed", 0)}: '
      f'failed. {row["error"]}'
      for row in rows
      if 'error' in row
    }
  )


def values(rows: Sequence[Row], task: str, key: str) -> list[float]:
  """Of the runs of one task that ended."""
  return [
    row[key] for row in rows if row['task'] == task and 'error' not in row
  ]


def spread(numbers: Sequence[float], *, percent: bool) -> str:
  """Mean and sample standard deviation in words."""
  digits = 1 if percent else 3
  return lib.spread(numbers, digits, percent=percent, missing='-')


def name(arm: str) -> str:
  """With a word that says what is a control."""
  return f'{arm} (control)' if arm in grid.CONTROLS else arm
