"""The tables of `README.md`, made from rows of `results.jsonl`."""

import functools
from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.passes import PASSES
from experiments.bench.rows import Row
from experiments.bench.tables import Table
from experiments.speed_64k import contenders, targets
from psa_jax import report


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{marker in the page: text} of everything that was measured."""
  texts = {}
  if any(row['what'] in ('lengths', 'decode', 'peak') for row in rows):
    header = ('target, 65,536 tokens', 'wanted', 'measured', '')
    texts['targets'] = report.markdown([header, *targets.targets(rows)])
  for what, table in TABLES.items():
    mine = [row for row in rows if row['what'] == what]
    if mine:
      parts = [report.markdown(table(mine)), *notes(what, mine)]
      texts[what] = lib.paragraphs(*parts, lib.caption(mine))
  return texts


def notes(what: str, rows: Sequence[Row]) -> list[str]:
  """What the numbers of a table need to be understood."""
  lines = [densities(rows), shares(rows)] if what == 'lengths' else []
  sizes = {
    row['contender']: f'{row["contender"]}: {row["version"]}, {row["sizes"]}.'
    for row in rows
    if 'sizes' in row
  }
  return [*lines, *sizes.values(), *lib.errors(rows)]


def lengths_table(rows: Sequence[Row]) -> Table:
  """Medians by length, a block of rows a pass."""
  rows = [row for row in rows if row['contender'] != contenders.GEMM]
  return lib.by_length(rows)


def decode_table(rows: Sequence[Row]) -> Table:
  """Medians by length, and how much faster ours is at the longest."""
  table = lib.by_length(rows, ('contender',))
  longest = max(row['length'] for row in rows)
  blocks = min(targets.settings(rows), default=0)
  name = contenders.whole(blocks)
  ours = lib.median(rows, length=longest, contender=name)
  ends = [f'{name} is faster by, at {longest:,}']
  for line in table[1:]:
    took = lib.median(rows, length=longest, contender=line[0])
    ends.append(f'{took / ours:.1f}x' if took and ours else '')
  return [(*line, end) for line, end in zip(table, ends, strict=True)]


def peak_table(rows: Sequence[Row]) -> Table:
  """MiB by length, and the growth over the last doubling."""
  show = functools.partial(lib.cell, field='bytes', show=lib.mebibytes)
  table = lib.by_length(rows, ('contender', 'of'), show)
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
  table: Table = [
    ('contender', 'pass', 'median s', 'lowest-highest s', 'psa is faster by')
  ]
  for row in rows:
    if 'median' in row and row['pass'] in ours:
      seconds = row['seconds']
      table.append((
        row['contender'],
        row['pass'],
        f'{row["median"]:.3f}',
        f'{min(seconds):.3f}-{max(seconds):.3f}',
        f'{row["median"] / ours[row["pass"]]:.1f}x',
      ))  # fmt: skip
  return table


def memory_table(rows: Sequence[Row]) -> Table:
  """Temporary memory of the train step."""
  rows = sorted(rows, key=lambda row: row['length'])
  first = rows[0]['bytes']
  table: Table = [('tokens', 'temporary MiB', 'ratio')]
  for row in rows:
    size, ratio = row['bytes'] / 2**20, row['bytes'] / first
    table.append((f'{row["length"]:,}', f'{size:,.0f}', f'{ratio:.2f}x'))
  return table


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
    row['blocks']: f'{row["blocks"]} blocks: {row["density"]:.1%} of the '
    'blocks that causal attention reads, '
    f'{row["share_of_square"]:.1%} of all'
    for row in rows
    if row['length'] == longest and 'density' in row
  }
  return f'At {longest:,} tokens, {"; ".join(parts.values())}.' if parts else ''


def shares(rows: Sequence[Row]) -> str:
  """How close the sparse contenders come to the machine's own product."""
  longest = max(row['length'] for row in rows)
  rate = targets.gemm_rate(rows, longest)
  if rate is None:
    return ''
  lines: dict[str, dict[str, str]] = {}
  for row in rows:
    if row['length'] == longest and 'median' in row and 'pairs_read' in row:
      read, seen = targets.gemm_shares(row, rate)
      line = lines.setdefault(row['contender'], dict.fromkeys(PASSES, ''))
      line[row['pass']] = f'{read:.0%} ({seen:.0%})'
  size = contenders.GEMM_SIZE
  header = (f'share of the GEMM rate at {longest:,}', *PASSES)
  table = [header, *((name, *line.values()) for name, line in lines.items())]
  return (
    f'The f32 product of [{size}, {size}] matrices runs at '
    f'{rate / 1e9:.0f} GFLOP/s in the same run. Shares of it, counting all '
    'that is read (and only what causality does not mask):\n\n'
    f'{report.markdown(table)}'
  )
