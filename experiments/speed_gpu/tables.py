"""The tables of `README.md`, made from rows of `results.jsonl`."""

import itertools
from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.attention import JAX_DENSE
from experiments.bench.passes import PASSES
from experiments.bench.rows import Row
from experiments.bench.tables import Table
from experiments.speed_gpu import contenders
from psa_jax import report

ORDER = (*PASSES, 'decode')
SDPA = ('PyTorch SDPA, flash', 'PyTorch SDPA, cuDNN')
FLEX = 'FlexAttention, same lists'
DENSE = (contenders.DENSE, *SDPA, JAX_DENSE)


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{marker in the page: text} of everything that was measured."""
  texts = {}
  widths = sorted({row['head_dim'] for row in rows}, reverse=True)
  for what in ('lengths', 'decode'):
    parts = []
    for width in widths:
      mine = [
        row for row in rows if (row['what'], row['head_dim']) == (what, width)
      ]
      if mine:
        parts += [f'Heads of {width}.', report.markdown(times(mine))]
    if parts:
      mine = [row for row in rows if row['what'] == what]
      texts[what] = lib.paragraphs(*parts, *failures(mine), caption(mine))
  ratios = ratio_table(rows)
  if len(ratios) > 1:
    texts['ratios'] = report.markdown(ratios)
  return texts


def caption(rows: Sequence[Row]) -> str:
  """Where and when the rows were measured, PyTorch's version included."""
  torch = sorted({row['version'] for row in rows if 'version' in row})
  return ', '.join([lib.caption(rows).rstrip('.'), *torch]) + '.'


def times(rows: Sequence[Row]) -> Table:
  """Medians by contender and pass, a column a length."""
  lengths = sorted({row['length'] for row in rows})
  table: Table = [('contender', 'pass', *(f'{n:,}' for n in lengths))]
  for which in ORDER:
    mine = [row for row in rows if row.get('pass') == which]
    for name in dict.fromkeys(row['contender'] for row in mine):
      at = {row['length']: row for row in mine if row['contender'] == name}
      table.append((name, which, *(lib.cell(at.get(n)) for n in lengths)))
  return table


def failures(rows: Sequence[Row]) -> list[str]:
  """Why a contender has no time, once a reason."""
  reasons = {
    f'{row["contender"]}, {row["pass"]}: {row["error"][:90]} ...'
    for row in rows
    if 'error' in row
  }
  return sorted(reasons)


def ratio_table(rows: Sequence[Row]) -> Table:
  """Ours against the fastest dense at the longest length."""
  table: Table = [
    ('heads of', 'pass', 'fastest dense', 'psa, selection included')
    + ('kernel alone', 'share of the GEMM rate, kernel', 'of it visible')
  ]
  length = max((row['length'] for row in rows), default=0)
  widths = sorted({row['head_dim'] for row in rows}, reverse=True)
  for width, which in itertools.product(widths, ORDER):
    at = {'length': length, 'head_dim': width, 'which': which}
    dense = lib.fastest(rows, DENSE, **at)
    ours = [
      lib.median(rows, contender=name, **at)
      for name in (contenders.WHOLE, contenders.KERNEL)
    ]
    if dense is None or ours[0] is None:
      continue
    name, best = dense
    table.append((
      str(width),
      which,
      f'{lib.duration(best)} ({name})',
      *(
        f'{lib.duration(took)}, {best / took:.1f}x' if took else ''
        for took in ours
      ),
      *shares(rows, length, width, which),
    ))  # fmt: skip
  return table


def shares(
  rows: Sequence[Row], length: int, width: int, which: str
) -> tuple[str, str]:
  """Of the GEMM rate: what is read, and what causality does not mask."""
  took = lib.median(rows, contender=contenders.GEMM)
  if took is None or which not in PASSES:
    return '', ''
  rate = lib.gemm_rate(contenders.GEMM_SIZE, took)
  about = length, width, which, contenders.KERNEL
  for row in rows:
    own = row['length'], row['head_dim'], row.get('pass'), row['contender']
    if own == about and 'pairs_read' in row and 'median' in row:
      read, visible = (
        f'{100 * lib.gemm_share(row, pairs, width, rate):.0f} %'
        for pairs in ('pairs_read', 'pairs_visible')
      )
      return read, visible
  return '', ''
