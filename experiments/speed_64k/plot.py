"""The picture of the page: time and memory over the length, log-log."""

from collections.abc import Sequence

from experiments.bench import plots
from experiments.bench.attention import JAX_DENSE
from experiments.bench.passes import BOTH
from experiments.bench.peers import NSA_MODULE, ONE_THREAD, SDPA
from experiments.bench.rows import Row
from experiments.speed_64k import contenders, targets

# Contenders that are not ours: label, colour, marker.
OTHERS = {
  contenders.OURS_DENSE: ('our dense', '#0072B2', 's'),
  JAX_DENSE: ('jax.nn dense', '#56B4E9', 'D'),
  SDPA: ('PyTorch SDPA', '#009E73', '^'),
  ONE_THREAD: ('PyTorch SDPA, one thread', '#009E73', '<'),
  NSA_MODULE: ('NSA module, pip', '#CC79A7', 'v'),
}
# Ours, smallest list first.
OURS = (('#D55E00', 'o'), ('#E69F00', 'P'), ('#000000', 'X'))
# what, pass, field, factor, title, unit
PANELS = (
  ('lengths', BOTH, 'median', 1, 'forward + backward', 'seconds'),
  ('decode', 'decode', 'median', 1e3, 'decode, one query', 'milliseconds'),
  ('peak', BOTH, 'bytes', 2**-20, 'memory of forward + backward', 'MiB'),
)


def draw(rows: Sequence[Row]):
  """The figure of the newest rows of `lengths`, `decode` and `peak`."""
  figure, axes = plots.panels(len(PANELS), (14, 5.2))
  names = styles(rows)
  measured = {panel[0] for panel in PANELS}
  lengths = sorted({row['length'] for row in rows if row['what'] in measured})
  for axis, (what, which, field, factor, title, unit) in zip(
    axes, PANELS, strict=True
  ):
    mine = [
      row for row in rows if (row['what'], row.get('pass')) == (what, which)
    ]
    plots.over_length(axis, mine, names, field, factor)
    included = '' if what == 'peak' else ', selection included'
    axis.set(title=title + included, ylabel=unit)
    plots.length_ticks(axis, lengths)
  mark_crossover(axes[0], rows)
  plots.shared_legend(figure, axes, ncols=8, fontsize=8.5)
  figure.tight_layout(rect=(0, 0.07, 1, 1))
  return figure


def styles(rows: Sequence[Row]):
  """{contender: settings of its line}, ours first."""
  ours = {
    contenders.whole(n): (f'psa, {n} blocks', *look)
    for n, look in zip(targets.settings(rows), OURS, strict=False)
  }
  return {
    name: {
      'label': label,
      'color': colour,
      'marker': marker,
      'linestyle': '-' if name in ours else '--',
    }
    for name, (label, colour, marker) in {**ours, **OTHERS}.items()
  }


def mark_crossover(axis, rows: Sequence[Row]) -> None:
  """The length from which ours is faster."""
  blocks = min(targets.settings(rows), default=0)
  at = targets.crossover(rows, blocks)
  if at is None:
    return
  axis.axvline(at, color='black', linestyle=':', linewidth=1)
  axis.annotate(
    f'psa, {blocks} blocks,\nfaster from {at:,}',
    (at, 0.97),
    xycoords=('data', 'axes fraction'),
    xytext=(5, 0),
    textcoords='offset points',
    verticalalignment='top',
    fontsize=8,
  )
