"""The whole run: one tree of sections, and what holds between them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from psa_jax.config.attention import names
from psa_jax.config.data import AugmentConfig, DataConfig
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

# Sources of `vit`, of `encoder` and of `encoder_decoder`; each of these models
# also takes `tfds:<name>`, `encoder_decoder` also `ddtp_en_<language>`.
PICTURES = ('mnist5k', 'digits')
LABELLED = ('verse_genre', 'vader3')
TAGGED = ('stdlib_tags',)
PARALLEL = ('asv_bbe',)
SYNTHETIC_TASKS = ('mqar', 'needle', 'selective_copy', 'variable_tracking')
_TEXTS = (*LABELLED, *TAGGED)
_SOURCES_OF = {
  'vit': f'{", ".join(PICTURES)} or tfds:<name>',
  'encoder': f'{", ".join(_TEXTS)} or tfds:<name>',
  'encoder_decoder': (
    f'{", ".join(PARALLEL)}, ddtp_en_<language> or tfds:<name>'
  ),
}


@dataclass(frozen=True)
class Config(Section):
  """The whole run."""

  name: str = 'lm'
  seed: int = number(0, OPTIONAL)
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
    yield from self._check_data(path)
    yield from self._check_others(path)
    yield from self._check_attention(path)
    yield from self._check_optim(path)

  def _check_attention(self, path: str) -> Iterator[str]:
    attention = self.model.attention
    where = f'{path}model.attention.{attention.mechanism.section}.'
    yield from attention.own.check_run(where, self)
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
    yield from attention.own.check_budget(where)
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

  def _check_data(self, path: str) -> Iterator[str]:
    source = self.data.source
    kind, _, rest = source.partition(':')
    model = self.model.kind
    own = {**dict.fromkeys(PICTURES, 'vit'), **dict.fromkeys(_TEXTS, 'encoder')}
    own |= dict.fromkeys(PARALLEL, 'encoder_decoder')
    needed = own.get(source, 'encoder_decoder' if _is_ddtp(source) else None)
    named = kind in ('tfds', 'files') and rest
    if needed and needed != model:
      yield (
        f'{path}data.source is {source!r}, which needs {path}model.kind='
        f'{needed}, not {model}'
      )
    elif (
      needed is None
      and model != 'decoder_lm'
      and not (named and kind == 'tfds')
    ):
      yield (
        f'{path}data.source is {source!r}, but {path}model.kind={model} takes '
        f'{_SOURCES_OF[model]}'
      )
    elif model == 'vit':
      yield from self._check_pictures(path)
    elif kind == 'synthetic':
      yield from self._check_synthetic(path, rest)
    elif not (needed or named or source in ('sotu', 'stdlib')):
      yield (
        f'{path}data.source is {source!r}, but it must be sotu, stdlib, '
        'tfds:<name>, files:<glob> or synthetic:<task>'
      )

  def _check_synthetic(self, path: str, task: str) -> Iterator[str]:
    if task not in SYNTHETIC_TASKS:
      yield (
        f'{path}data.source is {self.data.source!r}, but the task must be one '
        f'of {", ".join(SYNTHETIC_TASKS)}'
      )
    if self.data.threads:
      yield (
        f'{path}data.threads is {self.data.threads}, but one thread makes up '
        'the rows of synthetic tasks; set it to 0'
      )

  def _check_pictures(self, path: str) -> Iterator[str]:
    image, shift = self.model.image, self.data.shift
    if image.size % image.patch:
      yield (
        f'{path}model.image.patch is {image.patch}, but it must divide '
        f'{path}model.image.size, which is {image.size}'
      )
    if shift >= image.size:
      yield (
        f'{path}data.shift is {shift}, but it must be below '
        f'{path}model.image.size, which is {image.size}'
      )

  def _check_others(self, path: str) -> Iterator[str]:
    """Keys that not every kind of model has."""
    model = self.model.kind
    labels = 'vit', 'encoder', 'encoder_decoder'
    for key, value, default, kinds in (
      ('data.shift', self.data.shift, 0, ('vit',)),
      ('data.augment', self.data.augment, AugmentConfig(), ('vit',)),
      ('data.word_dropout', self.data.word_dropout, 0.0, ('encoder',)),
      ('data.words_key', self.data.words_key, '', ('encoder',)),
      ('train.label_smoothing', self.train.label_smoothing, 0.0, labels),
      ('eval.split', self.eval.split, 'validation', labels),
    ):
      if model not in kinds and value != default:
        yield (
          f'{path}{key} is {value!r}, but only {path}model.kind='
          f'{" or ".join(kinds)} has it'
        )


def _is_ddtp(source: str) -> bool:
  return re.fullmatch(r'ddtp_en_[a-z]{2,3}(_[A-Z]{2})?', source) is not None
