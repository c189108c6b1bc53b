"""The tables of the page, from the rows."""

from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.rows import Row
from experiments.slab.grid import ARMS
from psa_jax import report

NAMES = {
  'layernorm': 'LayerNorm (control)',
  'batchnorm': 'BatchNorm',
  'repbn': 'RepBN',
  'prepbn_16': 'PRepBN, T = 16 % of the steps',
  'prepbn_80': 'PRepBN, T = 80 % of the steps',
  'prepbn_16_eta0': 'PRepBN, T = 16 %, eta from 0 (ours)',
  'prepbn_80_eta0': 'PRepBN, T = 80 %, eta from 0 (ours)',
}
# ImageNet top-1 of the paper, percent: LayerNorm, PRepBN.
PUBLISHED = {
  'DeiT-T': (72.2, 73.6),
  'DeiT-S': (79.8, 80.2),
  'PVT-T': (75.1, 76.0),
  'Swin-T': (81.3, 81.4),
}


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """Section of the page -> its text."""
  texts = {
    'accuracy': accuracy([row for row in rows if row['what'] == 'run']),
    'latency': latency([row for row in rows if row['what'] == 'latency']),
    'published': published(),
  }
  return {name: text for name, text in texts.items() if text}


def accuracy(rows: Sequence[Row]) -> str:
  """Test accuracy by norm; empty without runs."""
  lines = []
  for arm in ARMS:
    own = [x for x in rows if x['arm'] == arm and 'error' not in x]
    ended = [x for x in own if 'diverged' not in x]
    if own:
      lines.append(
        (
          NAMES[arm],
          spread([x['test'] for x in ended]),
          spread([x['test_anew'] for x in ended if x['test_anew'] is not None]),
          spread([x['validation'] for x in ended]),
          f'{len(own) - len(ended)} of {len(own)}',
        )
      )
  if not lines:
    return ''
  header = (
    'norm',
    'test accuracy',
    'BN recalibrated',
    'validation accuracy',
    'diverged',
  )
  return lib.paragraphs(report.markdown([header, *lines]), lib.caption(rows))


def latency(rows: Sequence[Row]) -> str:
  """Seconds of a forward pass; empty without measurements."""
  if not rows:
    return ''
  lines = [
    (
      row['size'],
      str(row['batch']),
      f'{1e3 * row["layernorm"]:.3g} ms',
      f'{1e3 * row["folded"]:.3g} ms',
      f'{row["ratio"]:.2f}x ({row["quartiles"][0]:.2f} to '
      f'{row["quartiles"][1]:.2f})',
    )
    for row in rows
  ]
  header = ('model', 'pictures', 'LayerNorm', 'PRepBN, folded', 'faster')
  return lib.paragraphs(report.markdown([header, *lines]), lib.caption(rows))


def published() -> str:
  """The paper's ImageNet numbers."""
  lines = [
    (name, f'{norm:.1f} %', f'{ours:.1f} %')
    for name, (norm, ours) in PUBLISHED.items()
  ]
  header = ('published, ImageNet top-1', 'LayerNorm', 'PRepBN')
  return report.markdown([header, *lines])


def spread(values: Sequence[float]) -> str:
  """Mean and sample standard deviation in percent."""
  return lib.spread(values, 1, percent=True)
