"""The picture of the page: quality against the share of the keys read."""

import pathlib
import statistics
from collections.abc import Sequence

from experiments.mechanisms import grid, tables
from experiments.mechanisms.rows import Row

# Okabe and Ito, and markers that say the same again.
COLOURS = ('#000000', '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00')
COLOURS += ('#CC79A7', '#7F7F7F', '#8C6D31', '#332288', '#AA4499', '#44AA99')
MARKERS = 'sXPo^v<>Dph*'


def draw(rows: Sequence[Row], target: pathlib.Path) -> None:
  """Draws a panel a task.

  Args:
    rows: the newest of each run.
    target: picture to write.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  runs = [row for row in rows if row['what'] == 'quality']
  figure, axes = plt.subplots(1, len(grid.TASKS), figsize=(14, 5))
  for axis, task in zip(axes, grid.TASKS, strict=True):
    for arm, colour, marker in zip(grid.ARMS, COLOURS, MARKERS, strict=True):
      mine = [row for row in runs if row['arm'] == arm]
      quality = tables.values(mine, task, 'quality')
      density = tables.values(mine, task, 'density')
      if not quality:
        continue
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
        label=tables.name(arm),
      )
    axis.set(
      xlabel='share of the visible keys that is read, %',
      ylabel=tables.TITLES[task] + ('' if task == 'text' else ', %'),
      title=f'{task}, {"lower" if task == "text" else "higher"} is better',
    )
    axis.grid(alpha=0.3)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='lower center', ncols=6, bbox_to_anchor=(0.5, 0)
  )
  figure.tight_layout(rect=(0, 0.12, 1, 1))
  figure.savefig(target, dpi=120)
  plt.close(figure)
