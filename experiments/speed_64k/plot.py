"""The picture of the page: time and memory over the length, log-log.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart;
line styles and markers say the same again.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.speed_64k import contenders as lib
from experiments.speed_64k import targets
from experiments.speed_64k.pipe import NAMES, ONE_THREAD

Row = dict[str, Any]

# Contenders that are not ours: label, colour, marker.
OTHERS = {
  lib.OURS_DENSE: ('our dense', '#0072B2', 's'),
  lib.JAX_DENSE: ('jax.nn dense', '#56B4E9', 'D'),
  NAMES['sdpa']: ('PyTorch SDPA', '#009E73', '^'),
  ONE_THREAD: ('PyTorch SDPA, one thread', '#009E73', '<'),
  NAMES['nsa']: ('NSA module, pip', '#CC79A7', 'v'),
}
# Ours, smallest list first.
OURS = (('#D55E00', 'o'), ('#E69F00', 'P'), ('#000000', 'X'))


def draw(rows: Sequence[Row], target: pathlib.Path) -> None:
  """Draws the newest rows of `lengths`, `decode` and `peak`.

  Args:
    rows: one a subject; see `rows.newest`.
    target: picture to write.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, 3, figsize=(14, 5.2))
  styles = _styles(rows)
  for axis, what, which, value, factor in (
    (axes[0], 'lengths', targets.BOTH, 'median', 1),
    (axes[1], 'decode', 'decode', 'median', 1e3),
    (axes[2], 'peak', targets.BOTH, 'bytes', 2**-20),
  ):
    for name, (label, colour, marker) in styles.items():
      points = sorted(
        (row['length'], row[value] * factor)
        for row in rows
        if (row['what'], row.get('contender'), row.get('pass'))
        == (what, name, which)
        and value in row
      )
      if points:
        axis.plot(
          *zip(*points, strict=True),
          color=colour,
          marker=marker,
          label=label,
          linestyle='-' if name not in OTHERS else '--',
        )
  _label(axes, rows)
  handles: dict[Any, Any] = {}
  for axis in axes:
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    list(handles.values()),
    list(handles),
    loc='lower center',
    ncols=8,
    fontsize=8.5,
  )
  figure.tight_layout(rect=(0, 0.07, 1, 1))
  figure.savefig(target, dpi=120)
  plt.close(figure)


def _styles(rows):
  """{contender: (label, colour, marker)}, ours first."""
  ours = {
    lib.whole(n): (f'psa, {n} blocks', *look)
    for n, look in zip(targets.settings(rows), OURS, strict=False)
  }
  return {**ours, **OTHERS}


def _label(axes, rows):
  """Scales, titles, ticks at the measured lengths, and the crossover."""
  titles = (
    ('forward + backward, selection included', 'seconds'),
    ('decode, one query, selection included', 'milliseconds'),
    ('memory of forward + backward', 'MiB'),
  )
  drawn = [row for row in rows if row['what'] in ('lengths', 'decode', 'peak')]
  lengths = sorted({row['length'] for row in drawn})
  for axis, (title, unit) in zip(axes, titles, strict=True):
    axis.set(
      xscale='log', yscale='log', title=title, xlabel='tokens', ylabel=unit
    )
    axis.set_xticks(lengths, [_short(length) for length in lengths])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
  blocks = min(targets.settings(rows), default=0)
  at = targets.crossover(rows, blocks)
  if at is not None:
    axes[0].axvline(at, color='black', linestyle=':', linewidth=1)
    axes[0].annotate(
      f'psa, {blocks} blocks,\nfaster from {at:,}',
      (at, 0.97),
      xycoords=('data', 'axes fraction'),
      xytext=(5, 0),
      textcoords='offset points',
      verticalalignment='top',
      fontsize=8,
    )


def _short(length):
  return f'{length // 1024}k' if length % 1024 == 0 else f'{length:,}'
