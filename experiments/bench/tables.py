"""What the pages' tables have in common: numbers in words, lines by length."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.bench.passes import PASSES
from experiments.bench.rows import Row

Table = list[Sequence[str]]


def paragraphs(*parts: str) -> str:
  """Those that are not empty, one below the other."""
  return '\n\n'.join(part for part in parts if part)


def caption(rows: Sequence[Row]) -> str:
  """Where and when the rows were measured: the last one's, every commit."""
  ours = [row for row in rows if 'version' not in row] or rows
  commits = ' '.join(dict.fromkeys(row['commit'] for row in ours))
  last = ours[-1]
  where = last['gpu'] if 'gpu' in last else f'machine {last["machine"]}'
  words = [last['date'], f'commit {commits}']
  words += [f'{name} {last[name]}' for name in ('jax', 'python')]
  return f'{", ".join([*words, where])}.'


def duration(seconds: float) -> str:
  """Three digits with the unit that shows them."""
  for factor, unit in ((1, 's'), (1e3, 'ms')):
    if seconds * factor >= 1:
      return f'{seconds * factor:.3g} {unit}'
  return f'{seconds * 1e6:.3g} us'


def mebibytes(size: float) -> str:
  """Bytes as MiB."""
  return f'{size / 2**20:,.0f} MiB'


def spread(
  values: Sequence[float],
  digits: int = 3,
  *,
  percent: bool = False,
  missing: str = '',
) -> str:
  """Mean and, of several, sample standard deviation."""
  if not values:
    return missing
  factor, unit = (100, ' %') if percent else (1, '')
  mean = f'{factor * statistics.fmean(values):.{digits}f}'
  if len(values) == 1:
    return mean + unit
  return f'{mean} ± {factor * statistics.stdev(values):.{digits}f}{unit}'


def cell(
  row: Row | None, field: str = 'median', show: Callable = duration
) -> str:
  """A number in words, or why there is none."""
  if row is None:
    return ''
  if 'error' in row:
    return 'out of memory' if 'out of memory' in row['error'] else 'failed'
  return show(row[field])


def by_length(
  rows: Sequence[Row],
  heads: Sequence[str] = ('contender', 'pass'),
  show: Callable[[Row | None], str] = cell,
  order: Sequence[str] = PASSES,
) -> Table:
  """A line for each contender and pass, a column a length.

  Args:
    rows: one a subject.
    heads: fields that name a line.
    show: text of a row, or of None where there is none.
    order: of the passes; within one as at the longest length, where nobody is
      left out.
  """
  lengths = sorted({row['length'] for row in rows})
  rank = {which: number for number, which in enumerate(order)}
  lines: dict[tuple, dict[int, Row]] = {}
  for row in sorted(
    rows, key=lambda row: (rank.get(row['pass'], 0), -row['length'])
  ):
    line = lines.setdefault((row['contender'], row['pass']), {})
    line[row['length']] = row
  table: Table = [(*heads, *(f'{length:,}' for length in lengths))]
  for line in lines.values():
    names = (
      next((row[head] for row in line.values() if head in row), '')
      for head in heads
    )
    table.append((*names, *(show(line.get(length)) for length in lengths)))
  return table


def errors(rows: Sequence[Row], most: int = 300) -> list[str]:
  """Why a contender has no time, once a reason."""
  reasons = {
    f'{row["contender"]}, {row["pass"]}, {row["length"]:,} tokens: '
    f'{row["error"][:most]}.'
    for row in rows
    if 'error' in row and not row['error'].startswith('not tried')
  }
  return sorted(reasons)


def median(rows: Sequence[Row], **fields) -> float | None:
  """Median seconds of the row with these fields; `pass` is `which`."""
  if 'which' in fields:
    fields['pass'] = fields.pop('which')
  for row in rows:
    if 'median' in row and all(row.get(k) == v for k, v in fields.items()):
      return row['median']
  return None


def fastest(
  rows: Sequence[Row], names: Sequence[str], **fields
) -> tuple[str, float] | None:
  """Name and seconds of the fastest of some contenders; see `median`."""
  times = [
    (name, took)
    for name in names
    if (took := median(rows, contender=name, **fields)) is not None
  ]
  return min(times, key=lambda pair: pair[1], default=None)


# Products of [queries, keys] with a head's width: scores and output forward;
# backward again the scores, and the gradients of p, v, q and k.
PRODUCTS: Mapping[str, int] = dict(zip(PASSES, (2, 5, 7), strict=True))


def gemm_rate(size: int, seconds: float) -> float:
  """Operations a second of a product of square matrices."""
  return 2 * size**3 / seconds


def gemm_share(row: Row, pairs: str, head_dim: int, rate: float) -> float:
  """Useful operations a second as a share of the machine's own product.

  Args:
    row: of a sparse contender and a pass.
    pairs: `pairs_read` or `pairs_visible`.
    head_dim: width of a head.
    rate: see `gemm_rate`.
  """
  operations = 2 * PRODUCTS[row['pass']] * row[pairs] * head_dim
  return operations / row['median'] / rate


class Target(NamedTuple):
  """One line of a table of targets."""

  name: str
  wanted: str
  measured: str = 'not measured'
  verdict: str = ''

  def judged(self, measured: str, reached: bool) -> 'Target':
    """With what was measured."""
    verdict = 'met' if reached else 'missed'
    return self._replace(measured=measured, verdict=verdict)

  def at_least(self, ratio: float, least: float, note: str = '', digits=1):
    """Judged by a ratio."""
    text = f'{ratio:.{digits}f}x' + (f' ({note})' if note else '')
    return self.judged(text, ratio >= least)
