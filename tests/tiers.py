"""Three sizes of the suite, by one marker and one option.

  make test-quick   --tier quick    between two edits: minutes at most
  make test         --tier default  every property, at least at one shape
  .ci/run           --tier ci       and every kernel of a GPU or TPU simulated
  make test-all     --tier all      every shape, grid and race, XLA optimised

A test without a mark is in every tier. `pytest.mark.tier('default')`, `'ci'`
or `'all'` says the smallest tier that runs it: on a module (`pytestmark`), on a
test instead, or on some of a test's cases (`cases` below), where the larger of
the two counts. What is named with `::` on the command line runs in any tier.

What one module takes of the quick tier is bounded, in CPU seconds, which a busy
machine changes least: `make test-quick` fails with a module above.
"""

import collections
import os

import pytest

TIERS = ('quick', 'default', 'ci', 'all')
MODULE_SECONDS = 10.0

_seconds = collections.Counter()
_last = 0.0


def cases(values, *, quick, tier='default'):
  """Parameters of a test: those in `quick` always, others from `tier` on.

  A tuple is one value for each of several names.
  """
  mark = pytest.mark.tier(tier)
  return [
    pytest.param(
      *(x if isinstance(x, tuple) else (x,)), marks=() if x in quick else mark
    )
    for x in values
  ]


def cpu_seconds():
  """Of this process and of those that it started and waited for."""
  times = os.times()
  return times.user + times.system + times.children_user + times.children_system


def tier_of(item):
  for node in reversed(item.listchain()):
    names = [_name(item, m) for m in node.own_markers if m.name == 'tier']
    if names:
      return max(names, key=TIERS.index)
  return TIERS[0]


def _name(item, mark):
  if len(mark.args) != 1 or mark.args[0] not in TIERS:
    raise pytest.UsageError(
      f'{item.nodeid}: tier{mark.args} must name one of {", ".join(TIERS)}'
    )
  return mark.args[0]


def over_budget(seconds):
  """A line for each module that takes too long for the quick tier."""
  return [
    f'{module} takes {total:.1f} s of CPU in the quick tier, which allows '
    f"{MODULE_SECONDS:.0f}: mark its slow tests pytest.mark.tier('default')"
    for module, total in sorted(seconds.items())
    if total > MODULE_SECONDS
  ]


def pytest_addoption(parser):
  parser.addoption(
    '--tier', choices=TIERS, default='default', help='how much of the suite'
  )


def pytest_configure(config):
  config.addinivalue_line(
    'markers', 'tier(name): the smallest tier that runs this test'
  )


def pytest_collection_modifyitems(config, items):
  """Leaves out what a larger tier runs."""
  allowed = TIERS.index(config.getoption('tier'))
  if any('::' in arg for arg in config.args):
    allowed = len(TIERS)
  kept, dropped = [], []
  for item in items:
    within = TIERS.index(tier_of(item)) <= allowed
    (kept if within else dropped).append(item)
  if dropped:
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_runtest_logstart():
  global _last
  _last = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  """Every report carries what its phase took, to the first process too."""
  global _last
  report = yield
  now = cpu_seconds()
  report.quick_seconds = now - _last if tier_of(item) == TIERS[0] else 0.0
  _last = now
  return report


def pytest_runtest_logreport(report):
  # A worker that died sends none.
  seconds = getattr(report, 'quick_seconds', 0.0)
  _seconds[report.nodeid.split('::')[0]] += seconds


def _too_slow(config):
  return over_budget(_seconds) if config.getoption('tier') == 'quick' else []


def pytest_sessionfinish(session):
  if _too_slow(session.config) and not session.exitstatus:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
  lines = _too_slow(config)
  if lines:
    terminalreporter.section('the quick tier is too slow', red=True)
    for line in lines:
      terminalreporter.write_line(line)
