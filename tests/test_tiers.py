"""The tiers of the suite, on a suite of a few lines."""

import os
import re
import subprocess
import sys

import pytest

from tests import tiers
from tests.conftest import ROOT

SUITE = """
import time
import pytest

TIER = pytest.mark.tier

def test_plain(): pass

@TIER('default')
def test_default(): pass

@TIER('ci')
class TestGroup:
  def test_ci(self): pass

  @TIER('all')
  def test_all(self): pass

@pytest.mark.parametrize('x', [1, pytest.param(2, marks=TIER('all'))])
def test_case(x): pass

@TIER('default')
@pytest.mark.parametrize('x', [1, pytest.param(2, marks=TIER('all'))])
def test_case_of_a_tier(x): pass
"""
BUSY = """
import time

def test_busy():
  end = time.process_time() + 0.3
  while time.process_time() < end: pass
"""
HOOKS = """
from tests.tiers import *
from tests import tiers
tiers.MODULE_SECONDS = 0.2
"""


def run(folder, text, *args):
  """Output and exit code of a session over one file."""
  (folder / 'conftest.py').write_text(HOOKS)
  (folder / 'test_suite.py').write_text(text)
  result = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-p', 'xdist', *args],
    cwd=folder,
    env=os.environ
    | {'PYTHONPATH': str(ROOT), 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'},
    text=True,
    capture_output=True,
  )
  return result.stdout + result.stderr, result.returncode


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  'tier, passed', [('quick', 2), ('default', 4), ('ci', 5), ('all', 8)]
)
def test_a_tier_has_the_smaller_ones(tier, passed, tmp_path):
  out, code = run(tmp_path, SUITE, '-n', '0', '--tier', tier)
  assert code == 0 and f'{passed} passed' in out, out


@pytest.mark.tier('default')
def test_what_is_named_runs_in_any_tier(tmp_path):
  name = 'test_suite.py::TestGroup::test_all'
  out, _ = run(tmp_path, SUITE, '-n', '0', '--tier', 'quick', name)
  assert '1 passed' in out, out


def test_an_unknown_tier_is_an_error(tmp_path):
  out, code = run(tmp_path, SUITE.replace("'ci'", "'slow'"), '-n', '0')
  assert code and 'must name one of quick, default, ci, all' in out, out


@pytest.mark.tier('default')
@pytest.mark.parametrize('workers', [0, 2])
def test_a_module_that_is_too_slow_fails_the_session(workers, tmp_path):
  out, code = run(tmp_path, BUSY, '-n', str(workers), '--tier', 'quick')
  assert code == 1 and '1 passed' in out, out
  assert re.search(r'test_suite\.py takes 0\.\d s of CPU in the quick', out)


@pytest.mark.parametrize('seconds, slow', [(9.9, 0), (10.1, 1)])
def test_a_module_has_ten_seconds(seconds, slow):
  assert len(tiers.over_budget({'tests/test_x.py': seconds})) == slow
