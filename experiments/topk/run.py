"""Times of the top-k engine against `jax.lax.top_k` on this machine.

  python experiments/topk/run.py          one to two minutes

Every contender returns values and indices of the k largest entries. Ours keeps
the order of the entries, `jax.lax.top_k` sorts by value; `approx_max_k` may
miss some on TPUs and is exact elsewhere. Contenders are interleaved (A B C A B
C ...) in one process after a warm-up round; wall and process CPU seconds are
taken of every call, and the table shows medians. Rows are appended to
`results.jsonl` and the table in `README.md` is made from the newest of them.
"""

import json
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

_REPEATS = flags.DEFINE_integer('repeats', 15, 'Timed rounds.', lower_bound=1)
_SCALE = flags.DEFINE_integer(
  'scale', 1, 'Divides the number of rows, for a quick look.', lower_bound=1
)
_WRITE = flags.DEFINE_bool('write', True, 'Append results and update README.')

# name: rows, n, k, entries
CASES = {
  'normal': (64, 65_536, 1_024, 'normal'),
  'small integers': (64, 65_536, 1_024, 'integers'),
  'all equal': (64, 65_536, 1_024, 'equal'),
  'two values': (64, 65_536, 1_024, 'two'),
  'ascending': (64, 65_536, 1_024, 'ascending'),
  'descending': (64, 65_536, 1_024, 'descending'),
  'a third +inf, a third -inf': (64, 65_536, 1_024, 'infinite'),
  'one row': (1, 65_536, 64, 'normal'),
  'short rows': (4_096, 1_024, 32, 'normal'),
}
SOURCES = ['psa_jax', ':(glob)experiments/topk/*.py']
OURS, SORTED = 'psa_jax top_k', 'jax.lax.top_k'


def main(argv):
  """Measures every case and writes it down."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  from psa_jax import report

  rows = []
  for name, (R, n, k, entries) in CASES.items():
    x = make(entries, max(1, R // _SCALE.value), n)
    rows += measure(name, x, k)
  stamp = report.provenance(ROOT, SOURCES)
  rows = [{**row, **stamp} for row in rows]
  text = report.markdown(table(rows))
  print(text)
  if not _WRITE.value:
    return
  with (HERE / 'results.jsonl').open('a') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  versions = ', '.join(f'{key} {value}' for key, value in stamp.items())
  report.replace_section(HERE / 'README.md', 'cpu', f'{text}\n\n{versions}')


def make(entries, R, n):
  """f32 [R, n] of one kind of entries."""
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(0)
  x = {
    'normal': lambda: rng.standard_normal((R, n)),
    'integers': lambda: rng.integers(0, 100, (R, n)),
    'equal': lambda: np.ones((R, n)),
    'two': lambda: rng.integers(0, 2, (R, n)),
    'ascending': lambda: np.tile(np.arange(n), (R, 1)),
    'descending': lambda: np.tile(-np.arange(n), (R, 1)),
    'infinite': lambda: rng.choice([-np.inf, 0.0, np.inf], (R, n)),
  }[entries]()
  return jnp.asarray(x, jnp.float32)


def measure(name, x, k):
  """One row a contender."""
  import jax

  from psa_jax.kernels import topk

  contenders = {
    OURS: jax.jit(lambda x: topk.top_k(x, k)[:2]),
    SORTED: jax.jit(lambda x: jax.lax.top_k(x, k)),
    'jax.lax.approx_max_k': jax.jit(lambda x: jax.lax.approx_max_k(x, k)),
    'psa_jax select (mask only)': jax.jit(lambda x: topk.select(x, k)),
  }
  wall = {key: [] for key in contenders}
  cpu = {key: [] for key in contenders}
  for number in range(_REPEATS.value + 1):
    for key, call in contenders.items():
      began, used = time.perf_counter(), time.process_time()
      jax.block_until_ready(call(x))
      if number:
        wall[key].append(time.perf_counter() - began)
        cpu[key].append(time.process_time() - used)
  print(f'{name}: done', file=sys.stderr)
  return [
    {
      'case': name,
      'shape': list(x.shape),
      'k': k,
      'contender': key,
      'wall': statistics.median(wall[key]),
      'wall_range': [min(wall[key]), max(wall[key])],
      'cpu': statistics.median(cpu[key]),
    }
    for key in contenders
  ]


def table(rows):
  """Header and rows; the last columns compare with `jax.lax.top_k`."""
  base = {row['case']: row for row in rows if row['contender'] == SORTED}
  lines = [
    ('entries', 'shape', 'k', 'contender', 'wall ms', 'lowest-highest')
    + ('CPU ms', 'speed, wall', 'speed, CPU')
  ]
  for row in rows:
    low, high = row['wall_range']
    reference = base[row['case']]
    lines.append(
      (
        row['case'],
        ' x '.join(f'{size:,}' for size in row['shape']),
        f'{row["k"]:,}',
        row['contender'],
        f'{1e3 * row["wall"]:.2f}',
        f'{1e3 * low:.2f}-{1e3 * high:.2f}',
        f'{1e3 * row["cpu"]:.2f}',
        f'{reference["wall"] / row["wall"]:.2f}x',
        f'{reference["cpu"] / row["cpu"]:.2f}x',
      )
    )
  return lines


if __name__ == '__main__':
  app.run(main)
