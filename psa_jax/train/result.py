"""The end of a run: one record of quality and cost, and its table.

Start and end of a stage come from its first and last rows in `metrics.jsonl`,
so they survive interruptions of the run.
"""

import json
import pathlib
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from psa_jax import config as config_lib
from psa_jax import tasks
from psa_jax.config import Config, json_text
from psa_jax.eval import recall
from psa_jax.train import stages as stages_lib
from psa_jax.train import workdir
from psa_jax.train.console import Console, Table, clock

RESULT = 'result.json'
_ROWS = 5
_SHARES = {
  'density': 'density',
  'cross_density': 'density of reading the source',
  'kept_tokens': 'tokens kept',
  'kept_heads': 'heads kept',
}


def build(
  config: Config,
  *,
  rows: Sequence[Mapping[str, Any]],
  validation: Mapping[str, Mapping[str, Any]],
  baselines: Mapping[str, float],
  quality: str,
  seconds: float,
) -> dict[str, Any]:
  """Collects what a finished run reached and what it cost.

  Args:
    config: the run.
    rows: of `metrics.jsonl`.
    validation: metrics by attention mechanism, at the last step.
    baselines: what trivial models score.
    quality: the metric that the run is judged by.
    seconds: time of training, over all starts.
  """
  plan = stages_lib.plan(config)
  total = plan[-1].end
  return {
    **evaluation(config, total, validation, baselines, quality),
    'tokens': stages_lib.tokens_seen(plan, total),
    'train_seconds': seconds,
    'config': config_lib.to_dict(config),
    'stages': [_stage(stage, rows) for stage in plan],
  }


def evaluation(
  config: Config,
  step: int,
  validation: Mapping[str, Mapping[str, Any]],
  baselines: Mapping[str, float],
  quality: str,
) -> dict[str, Any]:
  """What an evaluation found, and the memory it took; see `build`."""
  memory, what = peak_memory()
  return {
    'name': config.name,
    'step': step,
    'mechanism': config.model.attention.name,
    'validation': {name: dict(metrics) for name, metrics in validation.items()},
    'baselines': dict(baselines),
    'quality': quality,
    'split': config.eval.split,
    'peak_memory_bytes': memory,
    'peak_memory_of': what,
  }


def save(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes `result.json`, with its own checksum."""
  workdir.write_json(folder / RESULT, json_text.sealed(result))


def load_complete(
  folder: pathlib.Path, config: Config
) -> dict[str, Any] | None:
  """The result of a run that has nothing left to do, else None.

  Another configuration has something left: its final evaluation. So has a
  result that is not as it was written: it is made again.
  """
  try:
    result = json_text.unsealed(json_text.read(folder / RESULT))
  except FileNotFoundError:
    return None
  except ValueError as e:
    logging.warning('%s is evaluated again: %s', folder / RESULT, e)
    return None
  wanted_config = json.loads(json.dumps(config_lib.to_dict(config)))
  saved = config_lib.with_task(result.get('config', {}))
  return result if saved == wanted_config else None


def show(console: Console, title: str, result: Mapping[str, Any]) -> None:
  """Shows the table of a run, or of an evaluation, and the task's own."""
  rows = table(result) if 'stages' in result else evaluation_table(result)
  console.table(title, rows)
  details = recall.table(result['validation'])
  if details:
    console.table('accuracy', details)


def table(result: Mapping[str, Any]) -> Table:
  """The rows that a run ends with."""
  first, last = result['stages'][0], result['stages'][-1]
  rows = [*_quality(result), *_change('', first['start'], last['end'])]
  if first is not last:
    rows += _change(f', {last["seq_len"]:,} tokens', last['start'], last['end'])
  compiled = [stage['compile_seconds'] for stage in result['stages']]
  return [
    *rows,
    ('compile seconds', ' + '.join(_number(s, '.1f') for s in compiled)),
    ('training time', clock(result['train_seconds'])),
    ('tokens seen', f'{result["tokens"]:,}'),
    _memory(result),
  ]


def evaluation_table(result: Mapping[str, Any]) -> Table:
  """The rows that an evaluation of a checkpoint ends with."""
  return [
    *_quality(result),
    *(
      (f'{label}, {name}', form(scores[metric]))
      for name, scores in result['validation'].items()
      for metric, label, form in _COSTS
      if metric in scores
    ),
    _memory(result),
  ]


def peak_memory() -> tuple[int, str]:
  """Bytes, and of what: the devices if they tell, else this process.

  Several devices: the fullest one.
  """
  memory = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [stats['peak_bytes_in_use'] for stats in memory if stats]
  if peaks:
    return max(peaks), 'fullest device'
  unit = 1 if sys.platform == 'darwin' else 1024
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return used * unit, 'process, maximum resident set'


def _quality(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """How good the model is, its dense reading and the baselines are."""
  scores = result['validation'][result['mechanism']]
  context = f'{scores["windows"]} windows of {scores["seq_len"]:,} tokens'
  rows = [(result['split'], context)]
  for name, scores in result['validation'].items():
    for metric, (label, form, *_) in tasks.metrics().items():
      if metric in scores:
        rows.append((f'{label}, {name} attention', f'{scores[metric]:{form}}'))
    if 'bleu_signature' in scores:
      rows.append(('sacrebleu', scores['bleu_signature']))
    for metric, label in _SHARES.items():
      if metric in scores:
        rows.append((f'{label}, {name} attention', f'{scores[metric]:.1%}'))
  label, form, *_ = tasks.metrics()[result['quality']]
  suffix = ', all validation text' if label == 'bits per byte' else ''
  for name, value in result['baselines'].items():
    rows.append((f'{label}, {name}{suffix}', f'{value:{form}}'))
  return rows


def _change(suffix: str, start, end) -> list[tuple[str, str]]:
  """From the start to the end of a stretch of training."""
  rows = []
  for name, label, form in (
    ('density', 'density', '.1%'),
    ('seconds_per_step', 'seconds per step', '.3f'),
  ):
    ends = [_number(edge.get(name), form) for edge in (start, end)]
    if start == end:  # one row is both
      rows.append((f'{label}{suffix}', ends[0]))
    else:
      rows.append((f'{label}{suffix}, start to end', ' -> '.join(ends)))
  return rows


def _memory(result) -> tuple[str, str]:
  used = result['peak_memory_bytes'] / 2**20
  return f'peak memory ({result["peak_memory_of"]})', f'{used:,.0f} MiB'


def _flops(value: float) -> str:
  return f'{value:.3g}'


def _seconds(value: float) -> str:
  return f'{value:.3f}' if value >= 0.01 else f'{value:.2g}'


_COSTS = (
  ('seconds_per_window', 'seconds per window', _seconds),
  ('seconds_per_translation', 'seconds per translation', _seconds),
  ('flops_per_window', 'FLOPs per window', _flops),
)


def _number(value: float | None, form: str) -> str:
  return '?' if value is None else format(value, form)


def _stage(stage: stages_lib.Stage, rows) -> dict[str, Any]:
  stage_rows = [
    row
    for row in rows
    if row['kind'] == 'train' and row['stage'] == stage.index
  ]
  compiled = [
    r['compile_seconds'] for r in stage_rows if 'compile_seconds' in r
  ]
  # Of a short stage the two ends share no row either.
  count = min(_ROWS, max(1, len(stage_rows) // 2))
  return {
    'seq_len': stage.seq_len,
    'batch_size': stage.batch_size,
    'steps': stage.end - stage.begin,
    'compile_seconds': compiled[0] if compiled else None,
    'start': _edge(stage_rows[:count], 0),
    'end': _edge(stage_rows[-count:], -1),
  }


def _edge(rows, index: int) -> dict[str, float]:
  """One end of a stage: schedules as they are, noisy numbers as medians."""
  edge = {}
  for name in ('loss', *tasks.metrics(), 'seconds_per_step'):
    values = [row[name] for row in rows if row.get(name) is not None]
    if values:
      edge[name] = statistics.median(values)
  for name in ('density', 'gamma'):
    if rows and rows[index].get(name) is not None:
      edge[name] = rows[index][name]
  return edge
