"""The tables of `README.md`, made from rows of `results.jsonl`."""

from collections.abc import Sequence
from typing import Any

from experiments.speed_64k import contenders as lib
from experiments.speed_64k import targets
from psa_jax import report

Row = dict[str, Any]
Table = list[tuple[str, ...]]


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{marker in the page: text} of everything that was measured.

  Args:
    rows: one a subject; see `rows.newest`.
  """
  found = {}
  if any(row['what'] in ('lengths', 'decode', 'peak') for row in rows):
    found['targets'] = report.markdown(targets_table(rows))
  for what, make in TABLES.items():
    mine = [row for row in rows if row['what'] == what]
    if mine:
      parts = [report.markdown(make(mine)), *notes(what, mine), caption(mine)]
      found[what] = '\n\n'.join(parts)
  return found


def caption(rows: Sequence[Row]) -> str:
  """Where and when the rows were measured."""
  last = rows[-1]
  return ', '.join(
    f'{key} {last[key]}' for key in ('date', 'commit', 'jax', 'machine')
  )


def notes(what: str, rows: Sequence[Row]) -> list[str]:
  """What the numbers of a table need to be understood."""
  lines = []
  if what == 'lengths':
    lines = [densities(rows), shares(rows)]
  sizes = {
    row['contender']: f'{row["contender"]}: {row["version"]}, {row["sizes"]}.'
    for row in rows
    if 'sizes' in row
  }
  errors = {
    f'{row["contender"]}, {row["pass"]}, {row["length"]:,} tokens: '
    f'{row["error"]}.'
    for row in rows
    if 'error' in row and not row['error'].startswith('not tried')
  }
  return [line for line in [*lines, *sizes.values(), *sorted(errors)] if line]


def targets_table(rows: Sequence[Row]) -> Table:
  """What was promised, and what was found."""
  header = ('target, 65,536 tokens', 'wanted', 'measured', '')
  return [header, *targets.targets(rows)]


def lengths_table(rows: Sequence[Row]) -> Table:
  """Medians by length, a block of rows a pass."""
  found = [row for row in rows if row['contender'] != lib.GEMM]
  return _by_length(found, _duration, ('contender', 'pass'))


def decode_table(rows: Sequence[Row]) -> Table:
  """Medians by length, and how much faster ours is at the longest."""
  table = _by_length(rows, _duration, ('contender',))
  longest = max(row['length'] for row in rows)
  blocks = min(targets.settings(rows), default=0)
  name = lib.whole(blocks)
  ours = targets.median(rows, 'decode', longest, name, 'decode')
  ends = [f'{name} is faster by, at {longest:,}']
  for line in table[1:]:
    took = targets.median(rows, 'decode', longest, line[0], 'decode')
    ends.append(f'{took / ours:.1f}x' if took and ours else '')
  return [(*line, end) for line, end in zip(table, ends, strict=True)]


def peak_table(rows: Sequence[Row]) -> Table:
  """MiB by length, and the growth over the last doubling."""
  table = _by_length(rows, _mebibytes, ('contender', 'of'))
  last = sorted({row['length'] for row in rows})[-2:]
  ends = ['over the last doubling']
  for line in table[1:]:
    sizes = [
      row['bytes']
      for length in last
      for row in rows
      if (row['length'], row['contender']) == (length, line[0])
      and 'bytes' in row
    ]
    ends.append(f'{sizes[1] / sizes[0]:.2f}x' if len(sizes) == 2 else '')
  return [(*line, end) for line, end in zip(table, ends, strict=True)]


def versus_table(rows: Sequence[Row]) -> Table:
  """One length: medians, their spread, and how much faster psa is."""
  ours = {
    row['pass']: row['median']
    for row in rows
    if row['contender'].split()[-1] == 'psa' and 'median' in row
  }
  header = (
    'contender',
    'pass',
    'median s',
    'lowest-highest s',
    'psa is faster by',
  )
  return [
    header,
    *(
      (
        row['contender'],
        row['pass'],
        f'{row["median"]:.3f}',
        f'{min(row["seconds"]):.3f}-{max(row["seconds"]):.3f}',
        f'{row["median"] / ours[row["pass"]]:.1f}x',
      )
      for row in rows
      if 'median' in row and row['pass'] in ours
    ),
  ]


def memory_table(rows: Sequence[Row]) -> Table:
  """Temporary memory of the train step."""
  rows = sorted(rows, key=lambda row: row['length'])
  first = rows[0]['bytes']
  return [
    ('tokens', 'temporary MiB', 'ratio'),
    *(
      (
        f'{row["length"]:,}',
        f'{row["bytes"] / 2**20:,.0f}',
        f'{row["bytes"] / first:.2f}x',
      )
      for row in rows
    ),
  ]


TABLES = {
  'lengths': lengths_table,
  'decode': decode_table,
  'peak': peak_table,
  'attention': versus_table,
  'step': versus_table,
  'memory': memory_table,
}


def densities(rows: Sequence[Row]) -> str:
  """What the settings read at the longest length."""
  longest = max(row['length'] for row in rows)
  parts = {
    row[
      'blocks'
    ]: f'{row["blocks"]} blocks: {row["density"]:.1%} of the blocks '
    f'that causal attention reads, {row["share_of_square"]:.1%} of all'
    for row in rows
    if row['length'] == longest and 'density' in row
  }
  if not parts:
    return ''
  return f'At {longest:,} tokens, {"; ".join(parts.values())}.'


def shares(rows: Sequence[Row]) -> str:
  """How close the sparse contenders come to the machine's own product."""
  longest = max(row['length'] for row in rows)
  took = targets.median(rows, 'lengths', longest, lib.GEMM, 'forward')
  if took is None:
    return ''
  lines = {}
  for row in rows:
    read = targets.gemm_share(rows, row, 'pairs_read')
    seen = targets.gemm_share(rows, row, 'pairs_visible')
    if row['length'] == longest and read is not None and seen is not None:
      line = lines.setdefault(row['contender'], dict.fromkeys(lib.PASSES, ''))
      line[row['pass']] = f'{read:.0%} ({seen:.0%})'
  size = lib.GEMM_SIZE
  rate = 2 * size**3 / took / 1e9
  header = (f'share of the GEMM rate at {longest:,}', *lib.PASSES)
  table = [header, *((name, *line.values()) for name, line in lines.items())]
  return (
    f'The f32 product of [{size}, {size}] matrices runs at {rate:.0f} GFLOP/s '
    'in the same run. Shares of it, counting all that is read (and only what '
    f'causality does not mask):\n\n{report.markdown(table)}'
  )


def _by_length(rows, cell, names) -> Table:
  """A line for each combination of the fields `names`, a column a length."""
  lengths = sorted({row['length'] for row in rows})
  lines = {}
  # By pass; within one as at the longest length, where nobody is left out.
  order = {which: i for i, which in enumerate(lib.PASSES)}
  for row in sorted(
    rows, key=lambda row: (order.get(row['pass'], 0), -row['length'])
  ):
    subject = row['contender'], row['pass']
    lines.setdefault(subject, {})[row['length']] = row
  table = [(*names, *(f'{length:,}' for length in lengths))]
  for found in lines.values():
    head = (
      next((r[name] for r in found.values() if name in r), '') for name in names
    )
    cells = (cell(found.get(length)) for length in lengths)
    table.append((*head, *cells))
  return table


def _duration(row: Row | None) -> str:
  """Median with a unit that shows three digits."""
  if row is None:
    return ''
  if 'error' in row:
    return _failure(row)
  took = row['median']
  for factor, unit in ((1, 's'), (1e3, 'ms')):
    if took * factor >= 1:
      return f'{took * factor:.3g} {unit}'
  return f'{took * 1e6:.3g} us'


def _mebibytes(row: Row | None) -> str:
  if row is None:
    return ''
  if 'error' in row:
    return _failure(row)
  return f'{row["bytes"] / 2**20:,.0f} MiB'


def _failure(row):
  return 'out of memory' if 'out of memory' in row['error'] else 'failed'
