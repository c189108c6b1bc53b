"""The programs of examples/ run and say what they claim."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tier('default')
EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / 'examples'


def run(name):
  """What a program prints, run from another folder than the repository's."""
  done = subprocess.run(
    [sys.executable, EXAMPLES / name],
    capture_output=True,
    text=True,
    cwd=EXAMPLES,
    env=environment(),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def environment():
  return os.environ | {'PYTHONPATH': str(EXAMPLES.parent)}


def test_all_programs_are_short():
  programs = sorted(EXAMPLES.glob('*.py'))
  assert programs
  for program in programs:
    assert len(program.read_text().splitlines()) < 80, program.name


def test_a_foreign_model_gives_the_same_until_less_is_kept():
  found = re.findall(
    r'keep=(\S+): outputs differ by (\S+)%', run('foreign_model.py')
  )
  kept, distance = zip(*((float(a), float(b)) for a, b in found), strict=True)
  assert kept == (1, 0.5, 0.25)
  assert distance[0] == 0 < distance[1] < distance[2]
