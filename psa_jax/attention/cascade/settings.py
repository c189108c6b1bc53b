"""The settings of cascade pruning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from psa_jax.config import MechanismConfig, ScheduleConfig
from psa_jax.config.fields import (
  COUNT,
  COUNTED,
  PROBABILITY,
  SHARE,
  UNIT,
  choice,
  number,
  schedule,
)

# Quotas are int32 products with 1024.
LONGEST = 2**21 - 1


@dataclass(frozen=True)
class CascadeConfig(MechanismConfig):
  """Cascade pruning of tokens and heads (docs/mechanisms.md#cascade).

  Attributes:
    token_keep, head_keep: mean share of tokens and of kv heads (a query head
      goes with its group) over the layers that prune them.
    value_keep: share of the visible values that every query and head reads,
      those of the largest probabilities.
    token_start, head_start: share of the layers, the first ones, that keep
      all tokens and all heads.
    slope: how steeply the kept share falls over the other layers: from 0, not
      at all, to 1.
    importance: what tokens are judged by: `attention` that they got, or
      `random` numbers, others for every step and text, which is a control for
      models that are not causal. Heads are judged by what they add.
    amount: schedule of how much of the pruning is in force, from 0 to 1.
    rungs: sizes are static: a schedule that moves climbs this many rungs, all
      in one program. A piecewise one has a rung for each of its values.
    documents: documents of a packed row whose budgets are rounded up.
    window: causal models: candidates that a token is compared with.
    credit: causal models: how far the count of survivors may lag behind.
  """

  token_keep: float = number(0.5, SHARE)
  head_keep: float = number(1.0, SHARE)
  value_keep: float = number(1.0, SHARE)
  token_start: float = number(0.15, UNIT)
  head_start: float = number(0.3, UNIT)
  slope: float = number(0.5, PROBABILITY)
  importance: str = choice('attention', 'attention', 'random')
  amount: ScheduleConfig = schedule(ScheduleConfig(), UNIT)
  rungs: int = number(4, COUNT)
  documents: int = number(1, COUNT)
  window: int = number(64, COUNT)
  credit: int = number(8, COUNTED)

  @property
  def prunes_heads(self) -> bool:
    """Whether heads leave, at any step."""
    return self.head_keep < 1

  def check_model(self, path: str, model: Any) -> Iterator[str]:
    """What a decoder, or quantised training, cannot have."""
    if self.importance == 'random' and model.causal:
      yield (
        f'{path}importance is random, but a decoder, whose caches are pruned '
        'by attention, cannot have this control; set it to attention'
      )
    if model.quant.enabled:
      yield (
        'model.quant.enabled is on, but cascade attention does not quantise '
        'what it has pruned; turn one of them off'
      )

  def check_run(self, path: str, run: Any) -> Iterator[str]:
    """Something is pruned, and rows are not too long to be counted."""
    if (self.token_keep, self.head_keep, self.value_keep) == (1, 1, 1):
      yield (
        f'{path}token_keep, head_keep and value_keep are 1, which prunes '
        'nothing; lower one, or set model.attention.name to dense'
      )
    if max(run.train.seq_len, default=0) > LONGEST:
      yield (
        f'train.seq_len is {run.train.seq_len}, but cascade pruning counts up '
        f'to {LONGEST} tokens a row'
      )
