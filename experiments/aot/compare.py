"""What changed between two sets of results, and whether it got worse."""

from typing import Any

Results = dict[str, dict[str, dict[str, Any]]]

# Of these, less is better. The others only may not change unseen.
COSTS = {
  'temp_bytes',
  'peak_bytes',
  'cycles',
  'bundles',
  'spills',
  'fills',
  'registers',
  'shared_bytes',
  'spill_bytes',
}


def differences(golden: Results, now: Results, *, numbers=True) -> list[str]:
  """One line for each difference, the worst first.

  Args:
    golden: machine -> case -> what was recorded.
    now: likewise, of this run.
    numbers: False compares only what compiles: other versions of the
      compilers give other numbers.
  """
  lines = []
  for machine in sorted({*golden, *now}):
    old, new = golden.get(machine, {}), now.get(machine, {})
    for case in sorted({*old, *new}):
      found = _case(old.get(case), new.get(case), numbers)
      lines += [f'{word}: {machine}, {case}: {what}' for word, what in found]
  rank = ('worse', 'changed', 'better')
  return sorted(lines, key=lambda line: rank.index(line.split(':')[0]))


def _case(old, new, numbers):
  """(`worse`, `changed` or `better`, what) of one case on one machine."""
  if old is None:
    yield 'changed', 'is not recorded yet'
  elif new is None:
    yield 'worse', 'is recorded and was not tried'
  elif old['compiled'] and not new['compiled']:
    yield 'worse', f'compiled, and now: {new["reason"]}'
  elif new['compiled'] and not old['compiled']:
    yield 'better', f'compiles, and did not: {old["reason"]}'
  elif not new['compiled']:
    if numbers and old['reason'] != new['reason']:
      yield 'changed', f'{old["reason"]} -> {new["reason"]}'
  elif numbers:
    for name in sorted({*old, *new} - {'compiled'}):
      if old.get(name) != new.get(name):
        yield _number(name, old.get(name), new.get(name))


def _number(name, old, new):
  if old is None or new is None or name not in COSTS:
    return 'changed', f'{name} {_text(old)} -> {_text(new)}'
  word = 'worse' if new > old else 'better'
  share = f' ({100 * (new - old) / old:+.1f} %)' if old else ''
  return word, f'{name} {_text(old)} -> {_text(new)}{share}'


def _text(number):
  return 'nothing' if number is None else f'{number:,}'
