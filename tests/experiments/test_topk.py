"""The top-k experiment runs on few rows, and its page shows its results."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_case_runs():
  done = subprocess.run(
    [sys.executable, 'experiments/topk/run.py']
    + ['--scale=64', '--repeats=1', '--nowrite'],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('psa_jax top_k') == 9
  assert '| short rows | 64 x 1,024 | 32 |' in done.stdout


def test_the_page_shows_the_newest_results():
  folder = ROOT / 'experiments' / 'topk'
  page = (folder / 'README.md').read_text()
  lines = (folder / 'results.jsonl').read_text().splitlines()
  newest = {}
  for row in map(json.loads, lines):
    newest[row['case'], row['contender']] = row
  for row in newest.values():
    assert f'| {1e3 * row["wall"]:.2f} |' in page
