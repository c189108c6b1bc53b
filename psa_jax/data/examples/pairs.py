"""Sentences and their translations, and their rows."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from psa_jax.data.examples import rows, splits
from psa_jax.data.text.tokenizer import SEPARATOR


class Pair(NamedTuple):
  """A text in bytes and its translation."""

  source: bytes
  target: bytes


class PairSet(NamedTuple):
  """Everything a run needs to know of its sentences.

  Attributes:
    examples: splits of `Pair`.
  """

  examples: splits.Examples

  @property
  def manifest(self) -> dict:
    """What it is; plain JSON values."""
    return self.examples.manifest


def from_pairs(pairs: Iterable[tuple[object, Pair]], manifest: dict) -> PairSet:
  """Splits (group, `Pair`) by group.

  Raises:
    ConfigError: an empty text or split.
  """

  def checked():
    for i, (group, pair) in enumerate(pairs):
      for text in pair:
        splits.text_of(text, manifest['source'], i)
      yield group, pair

  train, validation, test, manifest = splits.by_group(checked(), manifest)
  return PairSet(splits.Examples(train, validation, test, manifest))


class PairRows(rows.Rows):
  """source, source_ids, inputs, targets int32 [T], weights f32 [T].

  `source_ids` are segment ids. The target begins and ends with `SEPARATOR`:
  inputs begin with one, targets end with one, unless the text is cut.
  """

  def row(self, example: Pair):
    source = self.tokenizer.encode(example.source)[: self.length]
    target = self.tokenizer.encode(example.target)
    closed = [*target, SEPARATOR][: self.length]
    opened = [SEPARATOR, *target][: self.length]
    return {
      'source': self.fill(source),
      'source_ids': self.fill(np.ones(len(source))),
      'inputs': self.fill(opened),
      'targets': self.fill(closed),
      'weights': self.fill(np.ones(len(closed)), np.float32),
    }
