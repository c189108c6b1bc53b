"""The whole run: one tree of sections, and what holds between them."""

from collections.abc import Iterator
from dataclasses import dataclass

from psa_jax.config.attention import names
from psa_jax.config.data import DataConfig
from psa_jax.config.fields import (
  OPTIONAL,
  Section,
  number,
  section,
)
from psa_jax.config.model import ModelConfig
from psa_jax.config.train import (
  CheckpointConfig,
  EvalConfig,
  LogConfig,
  MeshConfig,
  OptimConfig,
  TrainConfig,
)


@dataclass(frozen=True)
class Config(Section):
  """The whole run.

  Attributes:
    task: what is learned, a file of `psa_jax/tasks`; `tasks.check` refuses a
      `model.kind` or a `data.source` that does not go with it.
  """

  name: str = 'lm'
  seed: int = number(0, OPTIONAL)
  task: str = 'language_modeling'
  data: DataConfig = DataConfig()
  model: ModelConfig = section(ModelConfig)
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  log: LogConfig = LogConfig()

  def check(self, path: str) -> Iterator[str]:
    """What holds between sections.

    What depends on the machine (devices of the mesh), on the data (vocabulary,
    document lengths) or on files is checked where it is known.
    """
    if not self.name.strip():
      yield f'{path}name is empty'
    yield from self._check_attention(path)
    yield from self._check_optim(path)

  def _check_attention(self, path: str) -> Iterator[str]:
    attention = self.model.attention
    where = f'{path}model.attention.{attention.mechanism.section}.'
    yield from attention.mechanism_config.check_run(where, self)
    controller = self.train.controller
    if controller.kind == 'none':
      return
    if not attention.mechanism.takes_budget:
      budgeted = ', '.join(names(takes_budget=True))
      yield (
        f'{path}train.controller.kind is {controller.kind}, but attention '
        f'{attention.name} has no budget to set; choose from {budgeted}, or '
        'kind=none'
      )
      return
    yield from attention.mechanism_config.check_budget(where)
    if controller.begin < attention.frozen_steps:
      yield (
        f'{path}train.controller.begin is {controller.begin}, but attention is '
        f'dense for the {attention.frozen_steps} steps of {where}warmup_steps, '
        'from which nothing can be learned; begin then'
      )

  def _check_optim(self, path: str) -> Iterator[str]:
    optim, train = self.optim, self.train
    end = optim.decay_steps or sum(train.steps)
    if optim.warmup_steps >= end:
      key = f'{path}optim.decay_steps'
      key = key if optim.decay_steps else f'the sum of {path}train.steps'
      yield (
        f'{path}optim.warmup_steps is {optim.warmup_steps}, but it must be '
        f'below {key}, which is {end}'
      )
    if any(size % optim.accumulate for size in train.batch_size):
      yield (
        f'{path}train.batch_size is {train.batch_size}, but each entry must be '
        f'a multiple of {path}optim.accumulate, which is {optim.accumulate}'
      )
