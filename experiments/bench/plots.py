"""What the pages' pictures have in common.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart;
line styles and markers say the same again. A picture holds a digest of what it
was drawn from, so that it is drawn anew only when rows or program changed:
other versions of Matplotlib write other bytes for the same picture.
"""

import hashlib
import inspect
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.bench.rows import Row

Draw = Callable[[Sequence[Row]], Any]
KEY = 'Description'  # of the PNG's text
COLOURS = ('#000000', '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00')
COLOURS += ('#CC79A7', '#7F7F7F', '#8C6D31', '#332288', '#AA4499', '#44AA99')


def panels(columns: int, size: tuple[float, float]):
  """A figure without a window, and its axes in a row."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
  for axis in axes[0]:
    axis.grid(alpha=0.3)
  return figure, axes[0]


def over_length(
  axis,
  rows: Sequence[Row],
  names: Mapping[str, Mapping[str, Any]],
  value: str = 'median',
  factor: float = 1,
) -> None:
  """Draws a line over the length for each contender, log-log.

  Args:
    axis: where.
    rows: of one measurement and pass.
    names: contender -> settings of its line.
    value: field of a row.
    factor: of the value.
  """
  for name, style in names.items():
    points = sorted(
      (row['length'], row[value] * factor)
      for row in rows
      if row.get('contender') == name and value in row
    )
    if points:
      axis.plot(*zip(*points, strict=True), **style)
  axis.set(xscale='log', yscale='log', xlabel='tokens')


def length_ticks(axis, lengths: Sequence[int]) -> None:
  """Ticks at the measured lengths alone."""
  labels = [f'{n // 1024}k' if n % 1024 == 0 else f'{n:,}' for n in lengths]
  axis.set_xticks(lengths, labels)
  axis.set_xticks([], minor=True)


def shared_legend(figure, axes, **settings) -> None:
  """One legend for all panels, below them."""
  handles: dict[str, Any] = {}
  for axis in axes:
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    list(handles.values()), list(handles), loc='lower center', **settings
  )


def digest(draw: Draw, rows: Sequence[Row]) -> str:
  """What a picture depends on: the rows and the programs that draw it."""
  programs = [inspect.getmodule(draw), sys.modules[__name__]]
  parts = [json.dumps(list(rows), sort_keys=True, default=list)]
  parts += [inspect.getsource(program) for program in programs if program]
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def digest_of(path: pathlib.Path) -> str | None:
  """The digest in a picture; None where there is none."""
  if not path.exists():
    return None
  from PIL import Image

  with Image.open(path) as image:
    return image.info.get(KEY)


def write(draw: Draw, rows: Sequence[Row], path: pathlib.Path) -> None:
  """Draws the picture, unless it shows these rows already."""
  wanted = digest(draw, rows)
  if digest_of(path) == wanted:
    return
  from matplotlib import pyplot as plt

  figure = draw(rows)
  figure.savefig(path, dpi=120, metadata={KEY: wanted})
  plt.close(figure)
