"""Examples as the rows of tokens that a model reads.

Id 0, which no text holds (`tokenizer.SEPARATOR`), fills rows up, stands for the
beginning and the end of a text, and for a token that is hidden in training.
Segment ids are 1 where there is text and 0 where there is none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from psa_jax.data.labelled import Labelled
from psa_jax.data.parallel import Pair
from psa_jax.data.tagged import Tagged
from psa_jax.data.tokenizer import SEPARATOR, Tokenizer


class _Rows(Sequence):
  """Random access to the rows of a split, as `pipeline` takes them."""

  def __init__(self, examples: Any, tokenizer: Tokenizer, length: int):
    """Of `length` tokens each; longer texts are cut."""
    self._examples, self._tokenizer = examples, tokenizer
    self._length = length

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    return self._row(self._examples[int(i)])

  def _fill(self, values, dtype=np.int32) -> np.ndarray:
    row = np.zeros(self._length, dtype)
    row[: len(values)] = values
    return row

  def _row(self, example: Any) -> dict[str, np.ndarray]:
    raise NotImplementedError


class LabelledRows(_Rows):
  """inputs, segment_ids int32 [T]; labels int32 []; weights f32 [1]."""

  def _row(self, example: Labelled):
    ids = self._tokenizer.encode(example.text)[: self._length]
    return {
      'inputs': self._fill(ids),
      'segment_ids': self._fill(np.ones(len(ids))),
      'labels': np.int32(example.label),
      'weights': np.ones(1, np.float32),
    }


class TaggedRows(_Rows):
  """inputs, segment_ids int32 [T]; by word: first, tags int32, weights f32.

  `first` is the place of a word's first token, where its tag is judged. There
  is room for T words; those that are not there have weight 0.
  """

  def _row(self, example: Tagged):
    ids: list[int] = []
    first: list[int] = []
    for word in example.words:
      pieces = self._tokenizer.encode(f' {word}'.encode())
      if len(ids) + len(pieces) > self._length:
        break
      first.append(len(ids))
      ids += pieces.tolist()
    return {
      'inputs': self._fill(ids),
      'segment_ids': self._fill(np.ones(len(ids))),
      'first': self._fill(first),
      'tags': self._fill(example.tags[: len(first)]),
      'weights': self._fill(np.ones(len(first)), np.float32),
    }


class PairRows(_Rows):
  """source, source_ids, inputs, targets int32 [T], weights f32 [T].

  `source_ids` are segment ids. The target begins and ends with `SEPARATOR`:
  inputs begin with one, targets end with one, unless the text is cut.
  """

  def _row(self, example: Pair):
    source = self._tokenizer.encode(example.source)[: self._length]
    target = self._tokenizer.encode(example.target)
    closed = [*target, SEPARATOR][: self._length]
    opened = [SEPARATOR, *target][: self._length]
    return {
      'source': self._fill(source),
      'source_ids': self._fill(np.ones(len(source))),
      'inputs': self._fill(opened),
      'targets': self._fill(closed),
      'weights': self._fill(np.ones(len(closed)), np.float32),
    }


def share_cut(lengths: Sequence[int], length: int) -> float:
  """The share of texts that are longer than a row."""
  return float(np.mean([size > length for size in lengths]))
