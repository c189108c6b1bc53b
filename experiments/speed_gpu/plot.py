"""The picture of `README.md`: time over the length."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.speed_gpu import contenders as lib
from experiments.speed_gpu import tables


def draw(rows: Sequence[dict[str, Any]], target: pathlib.Path) -> None:
  """Draws passes and decoding, log-log, heads of 128.

  Args:
    rows: newest of each; what has a single length is not drawn.
    target: picture to write.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  drawn = [
    row
    for row in rows
    if row['head_dim'] == 128 and 'median' in row and row['what'] != 'ceilings'
  ]
  panels = [
    which
    for which in ('forward', 'backward', 'decode')
    if len({row['length'] for row in drawn if row['pass'] == which}) > 1
  ]
  figure, axes = plt.subplots(
    1, len(panels), figsize=(5 * len(panels), 4.2), squeeze=False
  )
  for axis, which in zip(axes[0], panels, strict=True):
    mine = [row for row in drawn if row['pass'] == which]
    for name in dict.fromkeys(row['contender'] for row in mine):
      if name in (lib.XLA_KERNEL, lib.SELECTION):
        continue
      at = sorted(
        (row['length'], row['median'])
        for row in mine
        if row['contender'] == name
      )
      dashed = name in tables.DENSE or 'jax.nn' in name
      axis.plot(
        *zip(*at, strict=True),
        label=name,
        marker='o',
        linestyle='--' if dashed else '-',
      )
    axis.set_xscale('log', base=2)
    axis.set(yscale='log', xlabel='tokens', ylabel='seconds', title=which)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(target, dpi=120)
  plt.close(figure)
