"""The picture of the page: quality against the share of the keys read."""

import statistics
from collections.abc import Sequence

from experiments.bench import plots
from experiments.bench.rows import Row
from experiments.mechanisms import grid, tables

MARKERS = 'sXPo^v<>Dph*'


def draw(rows: Sequence[Row]):
  """The figure, a panel a task.

  Args:
    rows: the newest of each run.
  """
  runs = [row for row in rows if row['what'] == 'quality']
  figure, axes = plots.panels(len(grid.TASKS), (14, 5))
  for axis, task in zip(axes, grid.TASKS, strict=True):
    for arm, *look in zip(grid.ARMS, plots.COLOURS, MARKERS, strict=True):
      draw_arm(axis, [row for row in runs if row['arm'] == arm], task, *look)
    axis.set(
      xlabel='share of the visible keys that is read, %',
      ylabel=tables.TITLES[task] + ('' if task == 'text' else ', %'),
      title=f'{task}, {"lower" if task == "text" else "higher"} is better',
    )
  plots.shared_legend(figure, axes, ncols=6, bbox_to_anchor=(0.5, 0))
  figure.tight_layout(rect=(0, 0.12, 1, 1))
  return figure


def draw_arm(axis, rows, task, colour, marker) -> None:
  """Mean quality over mean density, with the seeds' deviation."""
  quality = tables.values(rows, task, 'quality')
  density = tables.values(rows, task, 'density')
  if not quality:
    return
  factor = 1 if task == 'text' else 100
  axis.errorbar(
    100 * statistics.mean(density),
    factor * statistics.mean(quality),
    yerr=factor * statistics.stdev(quality) if len(quality) > 1 else None,
    color=colour,
    marker=marker,
    markersize=9,
    linestyle='',
    capsize=3,
    label=tables.name(rows[0]['arm']),
  )
