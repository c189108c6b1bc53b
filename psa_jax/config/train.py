"""How a run goes: optimiser, stages, evaluation, checkpoints, devices, logs."""

from collections.abc import Iterator
from dataclasses import dataclass

from psa_jax.config import paths
from psa_jax.config.fields import (
  COUNT,
  OPTIONAL,
  POSITIVE,
  PROBABILITY,
  SHARE,
  UNIT,
  Section,
  choice,
  number,
  runtime,
)

DEVICES = '-1 or [1, inf)'


@dataclass(frozen=True)
class OptimConfig(Section):
  """AdamW with warm-up and cosine decay; steps count optimiser updates.

  Attributes:
    decay_steps: step at which the cosine ends; 0 means the run's length.
    final_lr_ratio: learning rate at the end as a share of `learning_rate`.
    weight_decay: decoupled; matrices only (no vectors or scalars).
    clip_norm: global gradient norm limit; 0 turns clipping off.
    accumulate: micro-batches per optimiser step; divides every batch size.
  """

  learning_rate: float = number(1e-3, POSITIVE)
  warmup_steps: int = number(20, OPTIONAL)
  decay_steps: int = number(0, OPTIONAL)
  final_lr_ratio: float = number(0.1, UNIT)
  b1: float = number(0.9, PROBABILITY)
  b2: float = number(0.95, PROBABILITY)
  eps: float = number(1e-8, POSITIVE)
  weight_decay: float = number(0.1, OPTIONAL)
  clip_norm: float = number(1.0, OPTIONAL)
  accumulate: int = number(1, COUNT)


@dataclass(frozen=True)
class ControllerConfig(Section):
  """A closed loop that sets attention's budget (see `train.controller`).

  Attributes:
    kind: `none` leaves the budget to the mechanism's schedule; `mass` watches
      the softmax mass that the selection retains; `loss` the training loss.
    target: retained mass to stay above.
    tolerance: how far above the target the mass must be before the budget is
      lowered; for `loss`, nats that the loss may lie above its reference.
    begin: steps of dense attention first.
    every: steps between two looks.
    lower: longest stride down, a factor on the budget.
    back_off: stride up, likewise.
    hold: looks without a stride down after one up.
    floor: smallest budget.
    forget: share by which the reference of the loss follows one above it.
  """

  kind: str = choice('none', 'none', 'mass', 'loss')
  target: float = number(0.9, '(0, 1)')
  tolerance: float = number(0.02, POSITIVE)
  begin: int = number(0, OPTIONAL)
  every: int = number(5, COUNT)
  lower: float = number(0.9, '(0, 1)')
  back_off: float = number(1.2, '(1, inf)')
  hold: int = number(2, OPTIONAL)
  floor: float = number(0.02, SHARE)
  forget: float = number(0.1, UNIT)

  def check(self, path: str) -> Iterator[str]:
    """No more than all of the mass can be retained."""
    reach = self.target + self.tolerance
    if self.kind == 'mass' and reach >= 1:
      yield (
        f'{path}target + tolerance is {reach:g}, but no more than a mass of 1 '
        'can be retained'
      )


@dataclass(frozen=True)
class TrainConfig(Section):
  """The run's length: stages of a context-length curriculum.

  `steps`, `seq_len` and `batch_size` have one entry a stage; each stage is
  compiled once. `loss_chunk` bounds the logits that exist at a time.
  `controller` may take the place of the attention's budget schedule.
  `init_from` is the work directory of a run of the same model, whose newest
  checkpoint gives the parameters to begin with; its attention may be another
  (dense), whose parameters are then new. `label_smoothing` is the share of a
  label, or of a token of a translation, that is spread over all others.
  """

  steps: tuple[int, ...] = number((100,), COUNT, runtime=True)
  seq_len: tuple[int, ...] = number((1024,), COUNT)
  batch_size: tuple[int, ...] = number((8,), COUNT)
  loss_chunk: int = number(8192, COUNT)
  controller: ControllerConfig = ControllerConfig()
  init_from: str = ''
  label_smoothing: float = number(0.0, PROBABILITY)

  def check(self, path: str) -> Iterator[str]:
    """Every stage has its steps, length and batch size."""
    if problem := paths.unusable(self.init_from, f'{path}init_from'):
      yield problem
    lengths = [len(t) for t in (self.steps, self.seq_len, self.batch_size)]
    if len(set(lengths)) > 1 or not all(lengths):
      yield (
        f'{path}steps, seq_len and batch_size need one entry for each '
        f'stage, but have {lengths[0]}, {lengths[1]} and {lengths[2]}'
      )
    if sum(self.steps) >= 2**31:
      yield (
        f'{path}steps end at step {sum(self.steps)}, but steps are below 2^31'
      )
    for length, size in zip(self.seq_len, self.batch_size, strict=False):
      if length * size >= 2**31:
        yield (
          f'{path}seq_len {length} and batch_size {size} are {length * size} '
          'tokens a step, but these are counted below 2^31'
        )


@dataclass(frozen=True)
class EvalConfig(Section):
  """Validation: every `every` steps (0: only at the end), `windows` windows.

  `dense` adds a final evaluation with dense attention. The context length is
  the last stage's unless `seq_len` is set. `split` is what is judged; a
  language model's text has no `test`. Translations are made with `beam`
  hypotheses (1 is greedy), whose log-probability is divided by length **
  `length_penalty`.
  `recalibrate_bn` is over how many training batches `--mode=eval` and
  `--mode=export` recalibrate batch norms (`train/recalibrate.py`); 0 keeps the
  running statistics.
  """

  every: int = number(0, OPTIONAL, runtime=True)
  windows: int = number(4, COUNT, runtime=True)
  seq_len: int = number(0, OPTIONAL, runtime=True)
  dense: bool = runtime(True)
  split: str = choice('validation', 'validation', 'test', runtime=True)
  recalibrate_bn: int = number(0, OPTIONAL, runtime=True)
  beam: int = number(4, COUNT, runtime=True)
  length_penalty: float = number(1.0, OPTIONAL, runtime=True)


@dataclass(frozen=True)
class CheckpointConfig(Section):
  """How often to save (optimiser steps; 0: only at the end), how many stay."""

  every: int = number(50, OPTIONAL, runtime=True)
  keep: int = number(2, COUNT, runtime=True)


@dataclass(frozen=True)
class MeshConfig(Section):
  """Devices per mesh axis; -1 takes what is left. The first axis is data."""

  data: int = number(-1, DEVICES)
  fsdp: int = number(1, DEVICES)
  tensor: int = number(1, DEVICES)

  def check(self, path: str) -> Iterator[str]:
    """One axis at most takes what is left."""
    sizes = (self.data, self.fsdp, self.tensor)
    if sizes.count(-1) > 1:
      yield (
        f'{path}data, fsdp and tensor are {sizes[0]}, {sizes[1]} and '
        f'{sizes[2]}, but only one may be -1'
      )


@dataclass(frozen=True)
class LogConfig(Section):
  """What is shown: a line and a metrics row every `every` steps."""

  every: int = number(1, COUNT, runtime=True)
  tensorboard: bool = runtime(True)
