"""The recorded results as Markdown."""

from psa_jax import report

# Shown in full; of the others, only whether they compile and spill.
SHOWN = {
  'v5e': 'TPU v5e',
  'sm_90a': 'H100 (sm_90a)',
  'sm_100a': 'B200 (sm_100a)',
}
COLUMNS = {
  'v5e': {
    'temp_bytes': 'temporary MiB',
    'peak_bytes': 'peak MiB',
    'flops': 'MFLOP',
    'cycles': 'kilocycles of XLA',
    'kernels': 'Pallas kernels',
    'bundles': 'bundles',
    'mxu': 'MXU slots',
    'spills': 'spills',
    'fills': 'fills',
  },
  'sm_90a': {
    'temp_bytes': 'temporary MiB',
    'peak_bytes': 'peak MiB',
    'flops': 'MFLOP',
    'registers': 'registers',
    'shared_bytes': 'shared bytes',
    'spill_bytes': 'spilled bytes',
  },
}
COLUMNS['sm_100a'] = COLUMNS['sm_90a']
UNITS = {'temp_bytes': 2**20, 'peak_bytes': 2**20, 'flops': 1e6, 'cycles': 1e3}


def text(results, versions) -> str:
  """The whole section: what compiles where, some machines in full."""
  reasons = []
  parts = ['**What compiles**', overview(results, reasons)]
  parts += [f'{i + 1}. {reason}' for i, reason in enumerate(reasons)]
  for machine, name in SHOWN.items():
    if results.get(machine):
      parts += [f'**{name}**', details(results[machine], COLUMNS[machine])]
  parts.append(', '.join(f'{k} {v}' for k, v in versions.items()))
  return '\n\n'.join(parts)


def overview(results, reasons) -> str:
  """Case x machine; numbers in brackets point into `reasons`."""
  machines = list(results)
  keys = dict.fromkeys(key for rows in results.values() for key in rows)
  cases = list(dict.fromkeys(map(_case, keys)))
  keys = sorted(keys, key=lambda key: cases.index(_case(key)))
  rows = [['case, implementation', *machines]]
  for key in keys:
    cells = [_cell(results[m].get(key), reasons) for m in machines]
    rows.append([key, *cells])
  return report.markdown(rows)


def _case(key):
  """The key without the implementation."""
  return key.rpartition(', ')[0]


def _cell(row, reasons):
  if row is None:
    return ''
  if row['compiled']:
    spills = row.get('spills', row.get('spill_bytes', 0))
    return f'yes, {spills:,} spilled' if spills else 'yes'
  if row['reason'] not in reasons:
    reasons.append(row['reason'])
  return f'no ({reasons.index(row["reason"]) + 1})'


def details(rows, columns) -> str:
  """Every number of one machine."""
  lines = [['case, implementation', *columns.values()]]
  for key, row in rows.items():
    if row['compiled']:
      lines.append([key, *(_number(name, row.get(name)) for name in columns)])
  return report.markdown(lines)


def _number(name, value):
  if value is None:
    return ''
  return f'{value / UNITS.get(name, 1):,.0f}'
