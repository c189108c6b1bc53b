"""The hybrid experiment counts what it says, and its page shows its results."""

import json
import pathlib

import numpy as np

from experiments.hybrid import counts

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'experiments' / 'hybrid'


def test_the_flattest_attention_reads_window_and_cap():
  """Zero queries ask for every block: forced + floor(visible / 4), by tile."""
  found = counts.cost(0.0, 4096)
  pairs = dense = 0
  for tile in range(32):
    first = tile * 128
    visible = (first + 127) // 64 + 1
    window = visible - max(first - 511, 0) // 64
    pairs += min(window + int(visible * 0.25), visible)
    dense += visible
  size = 128 * 64
  assert (found['pairs'], found['dense_pairs']) == (pairs * size, dense * size)
  selection = 32 * 64 * 64 + 4096 * 64
  assert found['multiply_adds'] == pairs * size * 128 + selection


def test_peaked_attention_reads_less():
  assert counts.cost(30.0, 4096)['pairs'] < counts.cost(0.0, 4096)['pairs']


def test_the_page_shows_the_newest_results():
  page = (FOLDER / 'README.md').read_text()
  newest = {}
  for line in (FOLDER / 'results.jsonl').read_text().splitlines():
    row = json.loads(line)
    newest[row['kind'], row.get('arm', row.get('scale'))] = row
  kinds = {kind for kind, _ in newest}
  assert kinds == {'cost', 'quality'}
  for row in newest.values():
    if row['kind'] == 'quality':
      assert f'| {row["bits_per_byte"]:.4f} |' in page
    else:
      assert row['length'] == 65_536
      share = row['multiply_adds'] / row['dense_multiply_adds']
      assert f'| {100 * share:.1f} % |' in page
      assert share <= 0.5, 'the claim'
      assert np.isfinite(row['entropy'])
