"""The picture of `README.md`: time over the length."""

from collections.abc import Sequence

from experiments.bench import plots
from experiments.bench.rows import Row
from experiments.speed_gpu import contenders, tables

HIDDEN = (contenders.XLA_KERNEL, contenders.SELECTION)


def draw(rows: Sequence[Row]):
  """The figure of passes and decoding, log-log, heads of 128.

  Args:
    rows: newest of each; what has a single length is not drawn.
  """
  drawn = [
    row
    for row in rows
    if row['head_dim'] == 128 and 'median' in row and row['what'] != 'ceilings'
  ]
  shown = [
    which
    for which in ('forward', 'backward', 'decode')
    if len({row['length'] for row in drawn if row['pass'] == which}) > 1
  ]
  figure, axes = plots.panels(len(shown), (5 * len(shown), 4.2))
  for axis, which in zip(axes, shown, strict=True):
    mine = [row for row in drawn if row['pass'] == which]
    names = dict.fromkeys(row['contender'] for row in mine)
    plots.over_length(
      axis, mine, {n: style(n) for n in names if n not in HIDDEN}
    )
    axis.set(ylabel='seconds', title=which)
    axis.set_xscale('log', base=2)
    axis.legend(fontsize=7)
  figure.tight_layout()
  return figure


def style(name: str) -> dict[str, str]:
  """Settings of a contender's line."""
  line = '--' if name in tables.DENSE else '-'
  return {'label': name, 'marker': 'o', 'linestyle': line}
