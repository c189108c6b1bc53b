"""Times of the top-k engine against `jax.lax.top_k` on this machine.

  python -m experiments.topk      one to two minutes

Every contender returns values and indices of the k largest entries. Ours keeps
the order of the entries, `jax.lax.top_k` sorts by value; `approx_max_k` may
miss some on TPUs and is exact elsewhere. Contenders of a case are interleaved
(A B C A B C ...) after a warm-up; wall and process CPU seconds are taken of
every round, and the table shows medians.
"""

import dataclasses
import statistics
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import cli, tables, timing
from experiments.bench.experiment import Experiment
from experiments.bench.settings import Settings, option
from psa_jax import report
from psa_jax.kernels import topk


class Case(NamedTuple):
  """One kind of input."""

  rows: int
  n: int
  k: int
  entries: str


CASES = {
  'normal': Case(64, 65_536, 1_024, 'normal'),
  'small integers': Case(64, 65_536, 1_024, 'integers'),
  'all equal': Case(64, 65_536, 1_024, 'equal'),
  'two values': Case(64, 65_536, 1_024, 'two'),
  'ascending': Case(64, 65_536, 1_024, 'ascending'),
  'descending': Case(64, 65_536, 1_024, 'descending'),
  'a third +inf, a third -inf': Case(64, 65_536, 1_024, 'infinite'),
  'one row': Case(1, 65_536, 64, 'normal'),
  'short rows': Case(4_096, 1_024, 32, 'normal'),
}
OURS, SORTED = 'psa_jax top_k', 'jax.lax.top_k'


@dataclasses.dataclass(frozen=True)
class TopkSettings(Settings):
  """What `--set` changes."""

  repeats: int = option(15, 'Timed rounds.', least=1)
  scale: int = option(1, 'Divides the number of rows.', least=1)


def run(settings, book):
  """A row for each case and contender."""
  for name, case in CASES.items():
    x = make(case.entries, max(1, case.rows // settings.scale), case.n)
    found = timing.interleave(contenders(x, case.k), repeats=settings.repeats)
    about = {'case': name, 'shape': list(x.shape), 'k': case.k}
    for (contender, _), took in found.items():
      if took.error is not None:
        continue  # `interleave` has said why
      book.add({
        **about,
        'contender': contender,
        'wall': statistics.median(took.seconds),
        'wall_range': [min(took.seconds), max(took.seconds)],
        'cpu': statistics.median(took.cpu),
      })  # fmt: skip


def make(entries, R, n):
  """f32 [R, n] of one kind of entries."""
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


def contenders(x, k):
  """By (name, pass)."""
  programs = {
    OURS: lambda x: topk.top_k(x, k)[:2],
    SORTED: lambda x: jax.lax.top_k(x, k),
    'jax.lax.approx_max_k': lambda x: jax.lax.approx_max_k(x, k),
    'psa_jax select (mask only)': lambda x: topk.select(x, k),
  }
  return {
    (name, 'forward'): timing.timed(jax.jit(program), x)
    for name, program in programs.items()
  }


def sections(rows):
  """The table; its last columns compare with `jax.lax.top_k`."""
  base = {row['case']: row for row in rows if row['contender'] == SORTED}
  lines = [
    ('entries', 'shape', 'k', 'contender', 'wall ms', 'lowest-highest')
    + ('CPU ms', 'speed, wall', 'speed, CPU')
  ]
  for row in rows:
    low, high = row['wall_range']
    reference = base[row['case']]
    lines.append((
      row['case'],
      ' x '.join(f'{size:,}' for size in row['shape']),
      f'{row["k"]:,}',
      row['contender'],
      f'{1e3 * row["wall"]:.2f}',
      f'{1e3 * low:.2f}-{1e3 * high:.2f}',
      f'{1e3 * row["cpu"]:.2f}',
      f'{reference["wall"] / row["wall"]:.2f}x',
      f'{reference["cpu"] / row["cpu"]:.2f}x',
    ))  # fmt: skip
  text = report.markdown(lines)
  return {'cpu': tables.paragraphs(text, tables.caption(rows))}


EXPERIMENT = Experiment(
  name='topk',
  about='top-k without sorting against jax.lax.top_k, two CPU cores',
  settings=TopkSettings(),
  quick=TopkSettings(repeats=1, scale=64),
  run=run,
  sections=sections,
  key=('case', 'contender'),
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
