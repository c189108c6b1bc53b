"""Tables of `README.md` from rows of `results.jsonl`."""

from experiments.nsa.contenders import (
  MECHANISMS,
  OURS_DENSE,
  PASSES,
  layer_name,
)
from experiments.speed_64k.pipe import NAMES
from psa_jax import report

DENSE = (OURS_DENSE, NAMES['sdpa'])
# Of the operation at 65,536 tokens and of the layer at 4,096.
WANTED = {'forward': 5, 'backward': 4}


def sections(rows):
  """{name of a section: Markdown} of what there are rows for."""
  found = {}
  for what in ('attention', 'module'):
    some = [row for row in rows if row['what'] == what]
    if some:
      found[what] = report.markdown(times(some))
  some = [row for row in rows if row['what'] == 'peak']
  if some:
    found['peak'] = report.markdown(peaks(some))
  if targets(rows):
    header = [('target', 'wanted', 'measured', '')]
    found['targets'] = report.markdown(header + targets(rows))
  if found:
    found['provenance'] = provenance(rows[-1])
  return found


def times(rows):
  """A line a contender and pass, a column a length."""
  lengths = sorted({row['length'] for row in rows})
  lines = [('contender', 'pass', *(f'{n:,}' for n in lengths))]
  at = {(r['contender'], r['pass'], r['length']): r for r in rows}
  for name, which in dict.fromkeys(key[:2] for key in at):
    cells = (cell(at.get((name, which, n))) for n in lengths)
    lines.append((name, which, *cells))
  return lines


def cell(row):
  """Seconds, or why there are none."""
  if row is None:
    return ''
  if 'error' in row:
    return row['error']
  return seconds(row['median'])


def seconds(value):
  """Three digits with a unit."""
  if value < 1:
    return f'{value * 1e3:.3g} ms'
  return f'{value:.2f} s' if value < 100 else f'{value:.0f} s'


def peaks(rows):
  """Memory of every whole layer."""
  lines = [('contender', 'tokens', 'growth of peak memory')]
  for row in rows:
    size = row.get('error') or f'{row["bytes"] / 2**20:,.0f} MiB'
    lines.append((row['contender'], f'{row["length"]:,}', size))
  return lines


def targets(rows):
  """Ratios against the fastest dense, and against the pip package."""
  lines = []
  median = {
    (r['what'], r['contender'], r['pass'], r['length']): r['median']
    for r in rows
    if 'median' in r
  }
  longest = max(
    (r['length'] for r in rows if r['what'] == 'attention'), default=0
  )
  for name in MECHANISMS:
    for which, wanted in WANTED.items():
      ours = median.get(('attention', name, which, longest))
      dense = {
        other: median[key]
        for other in DENSE
        if (key := ('attention', other, which, longest)) in median
      }
      if ours and dense:
        best = min(dense, key=lambda other: dense[other])
        what = f'{name}, {longest:,} tokens, {which}, against {best}'
        lines.append(judged(what, wanted, dense[best] / ours))
  pip = NAMES['nsa']
  for name in map(layer_name, MECHANISMS):
    for which in PASSES[:2]:
      for row in rows:
        key = ('module', name, which, row['length'])
        other = ('module', pip, which, row['length'])
        if key in median and other in median and row['contender'] == name:
          if (row['what'], row['pass']) == ('module', which):
            what = f'{name}, {row["length"]:,} tokens, {which}, against pip'
            lines.append(judged(what, 1, median[other] / median[key]))
  return lines + memory_targets(rows, pip)


def memory_targets(rows, pip):
  """The pip package's memory over ours."""
  size = {
    row['contender']: row['bytes']
    for row in rows
    if row['what'] == 'peak' and 'bytes' in row
  }
  return [
    judged(f'memory of {pip} over {name}', 10, size[pip] / size[name])
    for name in map(layer_name, MECHANISMS)
    if name in size and pip in size
  ]


def judged(what, wanted, ratio):
  """A line of the table of targets."""
  met = 'met' if ratio >= wanted else 'missed'
  return what, f'at least {wanted}x', f'{ratio:.1f}x', met


def provenance(row):
  """Where and with what the newest row was measured."""
  names = ('date', 'commit', 'jax', 'python', 'machine')
  return ', '.join(f'{name} {row[name]}' for name in names if name in row)
