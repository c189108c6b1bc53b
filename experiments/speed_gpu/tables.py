"""The tables of `README.md`, made from rows of `results.jsonl`."""

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.speed_gpu import contenders as lib
from psa_jax import report

Row = dict[str, Any]
ORDER = ('forward', 'backward', 'forward+backward', 'decode')
DENSE = (lib.DENSE, 'PyTorch SDPA, flash', 'PyTorch SDPA, cuDNN')


def newest(rows: Sequence[Row]) -> list[Row]:
  """Of each measurement the latest row."""
  kept = {}
  for row in rows:
    key = tuple(
      row.get(x) for x in ('what', 'length', 'head_dim', 'contender', 'pass')
    )
    kept[key] = row
  return list(kept.values())


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{marker in the page: text} of everything that was measured."""
  found = {}
  widths = sorted({row['head_dim'] for row in rows}, reverse=True)
  for what in ('lengths', 'decode'):
    parts = []
    for width in widths:
      mine = [
        row for row in rows if row['what'] == what and row['head_dim'] == width
      ]
      if mine:
        parts += [f'Heads of {width}.', report.markdown(times(mine))]
    if parts:
      mine = [row for row in rows if row['what'] == what]
      found[what] = '\n\n'.join([*parts, *errors(rows, what), caption(mine)])
  ratios = ratio_table(rows)
  if len(ratios) > 1:
    found['ratios'] = report.markdown(ratios)
  return found


def caption(rows: Sequence[Row]) -> str:
  """Where and when the rows were measured."""
  ours = [row for row in rows if 'version' not in row]
  torch = sorted({row['version'] for row in rows if 'version' in row})
  commits = ' '.join(dict.fromkeys(row['commit'] for row in ours))
  last = ours[-1]
  where = f'{last["date"]}, commit {commits}, JAX {last["jax"]}, {last["gpu"]}'
  return ', '.join([where, *torch]) + '.'


def times(rows: Sequence[Row]) -> list[Sequence[str]]:
  """Medians by contender and pass, a column a length."""
  lengths = sorted({row['length'] for row in rows})
  table: list[Sequence[str]] = [
    ('contender', 'pass', *(f'{n:,}' for n in lengths))
  ]
  for which in ORDER:
    mine = [row for row in rows if row.get('pass') == which]
    for name in dict.fromkeys(row['contender'] for row in mine):
      at = {
        row['length']: duration(row) for row in mine if row['contender'] == name
      }
      table.append((name, which, *(at.get(n, '') for n in lengths)))
  return table


def duration(row: Row) -> str:
  """A median in words."""
  if 'median' not in row:
    return 'failed'
  seconds = row['median']
  if seconds < 1e-3:
    return f'{1e6 * seconds:.3g} us'
  return f'{1e3 * seconds:.3g} ms'


def errors(rows: Sequence[Row], what: str) -> list[str]:
  """Why a contender has no time, once a reason."""
  found = {
    f'{row["contender"]}, {row["pass"]}: {row["error"][:90]} ...'
    for row in rows
    if row['what'] == what and 'error' in row
  }
  return sorted(found)


def ratio_table(rows: Sequence[Row]) -> list[Sequence[str]]:
  """Ours against the fastest dense at the longest length."""
  table: list[Sequence[str]] = [
    (
      'heads of',
      'pass',
      'fastest dense',
      'psa, selection included',
      'kernel alone',
      'share of the GEMM rate, kernel',
      'of it visible',
    )
  ]
  length = max((row['length'] for row in rows), default=0)
  rate = gemm_rate(rows)
  widths = sorted({row['head_dim'] for row in rows}, reverse=True)
  for width, which in itertools.product(widths, ORDER):
    at = {
      row['contender']: row
      for row in rows
      if (row['length'], row['head_dim'], row.get('pass'))
      == (length, width, which)
      and 'median' in row
    }
    dense = {k: v for k, v in at.items() if k in DENSE or 'jax.nn' in k}
    if not dense or lib.WHOLE not in at:
      continue
    name = min(dense, key=lambda k: dense[k]['median'])
    best = dense[name]['median']
    table.append(
      (
        str(width),
        which,
        f'{duration(dense[name])} ({name})',
        *(
          f'{duration(at[k])}, {best / at[k]["median"]:.1f}x'
          for k in (lib.WHOLE, lib.KERNEL)
        ),
        *shares(at[lib.KERNEL], which, width, rate),
      )
    )
  return table


def gemm_rate(rows: Sequence[Row]) -> float | None:
  """Operations a second of the large product."""
  took = [row['median'] for row in rows if row['contender'] == lib.GEMM]
  return 2 * lib.GEMM_SIZE**3 / took[-1] if took else None


def shares(
  row: Row, which: str, width: int, rate: float | None
) -> tuple[str, str]:
  """Of the GEMM rate: what is read, and what causality does not mask."""
  products = {'forward': 2, 'backward': 5, 'forward+backward': 7}
  if rate is None or which not in products or 'pairs_read' not in row:
    return '', ''
  each = 2 * width * products[which] / row['median'] / rate
  read, visible = (
    f'{100 * each * row[pairs]:.0f} %'
    for pairs in ('pairs_read', 'pairs_visible')
  )
  return read, visible
