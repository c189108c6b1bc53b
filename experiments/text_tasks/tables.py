"""The tables of the page, from the rows."""

import statistics
from collections.abc import Sequence

from experiments.grids import Row, caption
from experiments.text_tasks.grid import ARMS
from psa_jax import report

NAMES = {
  ('classify', ''): 'dense, 2 layers (the default)',
  ('classify', 'topk'): 'topk, a quarter of the tokens',
  ('classify', 'deep'): 'dense, 4 layers (control)',
  ('classify', 'cascade'): 'cascade, 4 layers',
  ('classify', 'cascade_random'): 'cascade, 4 layers, any tokens (control)',
  ('tag', ''): 'dense (the default)',
  ('tag', 'topk'): 'topk, an eighth of the tokens',
  ('translate', ''): 'dense (the default)',
  ('translate', 'topk'): 'topk, a quarter of both texts',
}
METRICS = {'macro_f1': 'macro-F1', 'span_f1': 'span F1', 'bleu': 'BLEU'}


def sections(rows: Sequence[Row]) -> dict[str, str]:
  """Section of the page -> its text; of every run the last row."""
  newest = {(x['task'], x['arm'], x['seed']): x for x in rows}
  good = [x for x in newest.values() if 'error' not in x]
  return {
    task: quality(task, own)
    for task in ARMS
    if (own := [x for x in good if x['task'] == task])
  }


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
      'pairs scored or read',
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
      density = statistics.fmean(x['density'] for x in own)
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
  return f'{report.markdown(lines)}\n\n{caption(rows)}'


def spread(values: Sequence[float], digits: int) -> str:
  """Mean and, of several, sample standard deviation."""
  mean = f'{statistics.fmean(values):.{digits}f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(values):.{digits}f}'
