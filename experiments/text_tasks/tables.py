"""The tables of the page, from the rows."""

import statistics
from collections.abc import Sequence

from experiments.bench import tables as lib
from experiments.bench.rows import Row
from experiments.bench.tables import spread
from experiments.text_tasks.grid import ARMS
from psa_jax import report

NAMES = {
  ('classify', ''): 'dense, 2 layers (the default)',
  ('classify', 'topk'): 'topk, a quarter of the tokens',
  ('classify', 'deep'): 'dense, 3 layers (control)',
  ('classify', 'cascade'): 'cascade, 3 layers',
  ('classify', 'cascade_random'): 'cascade, 3 layers, any tokens (control)',
  ('tag', ''): 'dense (the default)',
  ('tag', 'topk'): 'topk, an eighth of the tokens',
  ('translate', ''): 'dense (the default)',
  ('translate', 'topk'): 'topk, a quarter of both texts',
}
METRICS = {'macro_f1': 'macro-F1', 'span_f1': 'span F1', 'bleu': 'BLEU'}


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """Section of the page -> its text."""
  texts = {}
  for task in ARMS:
    mine = [row for row in rows if row['task'] == task]
    good = [row for row in mine if 'error' not in row]
    failed = [
      f'{row["arm"] or "default"}, seed {row["seed"]}: failed. {row["error"]}'
      for row in mine
      if 'error' in row
    ]
    if good:
      parts = [quality(task, good), *failed, lib.caption(good)]
      texts[task] = lib.paragraphs(*parts)
  return texts


def quality(task: str, rows: Sequence[Row]) -> str:
  """What the arms of a task reach, above what a simple model does."""
  metric = METRICS[rows[0]['metric']]
  digits = 1 if task == 'translate' else 3
  lines = [
    (
      'arm',
      f'{metric}, validation',
      f'{metric}, test',
      'tokens kept',
      'pairs read',
      'seeds',
    )
  ]
  first = rows[0]
  seen, unseen = (
    f'{first[f"baseline_{split}"]:.{digits}f}'
    for split in ('validation', 'test')
  )
  lines.append((f'{first["baseline"]} (baseline)', seen, unseen, '', '', ''))
  for arm in ARMS[task]:
    own = [x for x in rows if x['arm'] == arm]
    if own:
      tokens = statistics.fmean(x.get('kept_tokens', 1) for x in own)
      density = statistics.fmean(map(density_of, own))
      lines.append(
        (
          NAMES[task, arm],
          spread([x['validation'] for x in own], digits),
          spread([x['test'] for x in own], digits),
          f'{tokens:.0%}',
          f'{density:.0%}',
          str(len(own)),
        )
      )
  return report.markdown(lines)


def density_of(row: Row) -> float:
  """Pairs read of those visible; translations have three kinds of attention."""
  own, cross = row['density'], row.get('cross_density')
  return own if cross is None else (2 * own + cross) / 3
