"""The speed experiment runs from end to end on short sequences."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_measurement_runs():
  done = subprocess.run(
    [
      sys.executable,
      'experiments/speed_64k/run.py',
      '--length=1024',
      '--repeats=1',
      '--peers=',
      '--nowrite',
    ],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  for row in ('psa_jax psa | forward', 'psa_jax dense | backward', '1,024'):
    assert row in done.stdout
  assert done.stdout.count('whole train step') == 2


def test_the_page_shows_the_newest_results():
  """The tables were generated from rows that are in results.jsonl."""
  folder = ROOT / 'experiments' / 'speed_64k'
  page = (folder / 'README.md').read_text()
  lines = (folder / 'results.jsonl').read_text().splitlines()
  newest = {}
  for row in map(json.loads, lines):
    newest[
      row['what'], row['length'], row.get('contender'), row.get('pass')
    ] = row
  for row in newest.values():
    if row['what'] == 'memory':
      assert f'{row["bytes"] / 2**20:,.0f}' in page
    else:
      assert f'| {row["median"]:.3f} |' in page
