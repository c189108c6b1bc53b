"""Texts with a label each, and their rows."""

from typing import NamedTuple

import numpy as np

from psa_jax.config import ConfigError
from psa_jax.data.examples import rows, splits


class Labelled(NamedTuple):
  """A text in bytes and its label, from 0 on."""

  text: bytes
  label: int


class LabelledSet(NamedTuple):
  """Everything a run needs to know of its texts.

  Attributes:
    examples: splits of `Labelled`.
    classes: names of the labels.
  """

  examples: splits.Examples
  classes: tuple[str, ...]

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest


def from_pairs(pairs, classes: tuple[str, ...], manifest: dict) -> LabelledSet:
  """Splits (group, `Labelled`) by group.

  Raises:
    ConfigError: a label out of range, or an empty text or split.
  """

  def checked():
    for i, (group, example) in enumerate(pairs):
      splits.text_of(example.text, manifest['source'], i)
      yield group, check(example, len(classes), manifest['source'], i)

  train, validation, test, manifest = splits.by_group(checked(), manifest)
  parts = splits.Examples(train, validation, test, manifest)
  return LabelledSet(parts, classes)


def check(example: Labelled, classes: int, where: str, i: int) -> Labelled:
  """The example.

  Raises:
    ConfigError: its label is none of the classes.
  """
  if not 0 <= example.label < classes:
    raise ConfigError(
      f'{where}: record {i} has label {example.label}, but there are {classes} '
      f'classes, 0 to {classes - 1}; choose a split with labels (eval.split) '
      'or fix the record'
    )
  return example


class LabelledRows(rows.Rows):
  """inputs, segment_ids int32 [T]; labels int32 []; weights f32 [1]."""

  def row(self, example: Labelled):
    ids = self.tokenizer.encode(example.text)[: self.length]
    return {
      'inputs': self.fill(ids),
      'segment_ids': self.fill(np.ones(len(ids))),
      'labels': np.int32(example.label),
      'weights': np.ones(1, np.float32),
    }
