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


def test_a_loop_of_ones_own_follows_the_schedule():
  output = run('training_loop.py')
  found = re.findall(r'step \d+: loss (\S+), density (\S+)%', output)
  losses, densities = zip(
    *((float(a), float(b)) for a, b in found), strict=True
  )
  assert losses[-1] < losses[0] / 2
  assert densities[0] == 100 > densities[3] > densities[-1]
  assert 'programs compiled: 1' in output


def test_a_mechanism_of_ones_own():
  output = run('own_mechanism.py')
  found = re.findall(r'stride=(\d+): density (\S+)%, off by (\S+)%', output)
  strides, densities, distances = zip(*found, strict=True)
  assert strides == ('32', '8', '1')
  assert float(densities[0]) < float(densities[1]) < float(densities[2]) == 100
  assert float(distances[0]) > float(distances[1]) > float(distances[2]) == 0
  assert (
    'refused: StridedConfig.stride is 0, but it must be at least 1' in output
  )
