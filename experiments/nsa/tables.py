"""Tables of `README.md` from rows of `results.jsonl`."""

import functools
from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.passes import BACKWARD, FORWARD
from experiments.bench.peers import NSA_MODULE, SDPA
from experiments.bench.rows import Row
from experiments.bench.tables import Table, Target
from experiments.nsa.contenders import MECHANISMS, OURS_DENSE, layer_name
from psa_jax import report

DENSE = (OURS_DENSE, SDPA)
# Of the operation at the longest length.
WANTED = {FORWARD: 5, BACKWARD: 4}


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """{name of a section: Markdown} of what there are rows for."""
  texts = {}
  makers = {'attention': times, 'module': times, 'peak': peaks}
  for what, table in makers.items():
    mine = [row for row in rows if row['what'] == what]
    if mine:
      texts[what] = report.markdown(table(mine))
  lines = targets(rows)
  if lines:
    header = ('target', 'wanted', 'measured', '')
    texts['targets'] = report.markdown([header, *lines])
  if texts:
    texts['provenance'] = lib.caption(rows)
  return texts


def times(rows: Sequence[Row]) -> Table:
  """A line a contender and pass, a column a length."""
  lengths = sorted({row['length'] for row in rows})
  table: Table = [('contender', 'pass', *(f'{n:,}' for n in lengths))]
  at = {(row['contender'], row['pass'], row['length']): row for row in rows}
  for name, which in dict.fromkeys(key[:2] for key in at):
    cells = (lib.cell(at.get((name, which, n))) for n in lengths)
    table.append((name, which, *cells))
  return table


def peaks(rows: Sequence[Row]) -> Table:
  """Memory of every whole layer."""
  table: Table = [('contender', 'tokens', 'growth of peak memory')]
  show = functools.partial(lib.cell, field='bytes', show=lib.mebibytes)
  for row in rows:
    table.append((row['contender'], f'{row["length"]:,}', show(row)))
  return table


def targets(rows: Sequence[Row]) -> list[Target]:
  """What was wanted of speed and memory, where it was measured."""
  lines = []
  lengths = {what: 0 for what in ('attention', 'module')}
  for row in rows:
    if row['what'] in lengths:
      lengths[row['what']] = max(lengths[row['what']], row['length'])
  for name in MECHANISMS:
    for which, least in WANTED.items():
      at = {'what': 'attention', 'length': lengths['attention']}
      ours = lib.median(rows, contender=name, which=which, **at)
      dense = lib.fastest(rows, DENSE, which=which, **at)
      if ours and dense:
        subject = f'{name}, {at["length"]:,} tokens, {which}'
        target = Target(f'{subject}, against {dense[0]}', f'at least {least}x')
        lines.append(target.at_least(dense[1] / ours, least))
  for name in map(layer_name, MECHANISMS):
    for which in WANTED:
      at = {'what': 'module', 'length': lengths['module'], 'which': which}
      ours = lib.median(rows, contender=name, **at)
      pip = lib.median(rows, contender=NSA_MODULE, **at)
      if ours and pip:
        subject = f'{name}, {at["length"]:,} tokens, {which}, against pip'
        lines.append(Target(subject, 'at least 1x').at_least(pip / ours, 1))
  return lines + memory_targets(rows)


def memory_targets(rows: Sequence[Row]) -> list[Target]:
  """The pip package's memory over ours."""
  size = {
    row['contender']: row['bytes']
    for row in rows
    if row['what'] == 'peak' and 'bytes' in row
  }
  return [
    Target(f'memory of {NSA_MODULE} over {name}', 'at least 10x').at_least(
      size[NSA_MODULE] / size[name], 10
    )
    for name in map(layer_name, MECHANISMS)
    if name in size and NSA_MODULE in size
  ]
