"""The tables of the page, from the rows."""

import statistics
from collections.abc import Sequence

from experiments.grids import caption
from experiments.mechanisms import grid
from experiments.mechanisms.rows import Row
from psa_jax import report

TITLES = {
  'text': 'bits per byte, 8,192 bytes',
  'mqar': 'MQAR accuracy',
  'needle': 'needle accuracy',
}


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{marker in the page: text} of everything that was found."""
  found = {}
  for name, make in (
    ('quality', quality),
    ('recall', recall),
    ('cost', costs),
  ):
    what = 'cost' if name == 'cost' else 'quality'
    mine = [row for row in rows if row['what'] == what]
    if mine:
      text = report.markdown(make(mine))
      found[name] = '\n\n'.join([text, *failures(mine), caption(mine)])
  return found


def quality(rows: Sequence[Row]) -> list[tuple[str, ...]]:
  """Mean and spread of the seeds by arm and task, controls first."""
  table = [
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


def recall(rows: Sequence[Row]) -> list[tuple[str, ...]]:
  """MQAR by the distance of the fact, mean of the seeds."""
  mine = [row for row in rows if row['task'] == 'mqar' and 'by' in row]
  labels = [x[0] for x in mine[0]['by']['distance']] if mine else []
  table = [('attention', *labels, 'density')]
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


def costs(rows: Sequence[Row]) -> list[tuple[str, ...]]:
  """Times beside dense attention's in the same run, keys and memory."""
  at = {row['arm']: row for row in rows if 'error' not in row}
  table = [
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
  if not numbers:
    return '-'
  factor, digits, unit = (100, 1, ' %') if percent else (1, 3, '')
  mean = factor * statistics.mean(numbers)
  if len(numbers) == 1:
    return f'{mean:.{digits}f}{unit}'
  deviation = factor * statistics.stdev(numbers)
  return f'{mean:.{digits}f} ± {deviation:.{digits}f}{unit}'


def name(arm: str) -> str:
  """With a word that says what is a control."""
  return f'{arm} (control)' if arm in grid.CONTROLS else arm
