"""Examples as the rows of tokens that a model reads: what all kinds share.

Id 0, which no text holds (`tokenizer.SEPARATOR`), fills rows up, stands for the
beginning and the end of a text, and for a token that is hidden in training.
Segment ids are 1 where there is text and 0 where there is none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from psa_jax.data.text.tokenizer import Tokenizer


class Rows(Sequence):
  """Random access to the rows of a split, as `pipeline` takes them."""

  def __init__(self, examples: Any, tokenizer: Tokenizer, length: int):
    """Of `length` tokens each; longer texts are cut."""
    self.examples, self.tokenizer, self.length = examples, tokenizer, length

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    return self.row(self.examples[int(i)])

  def fill(self, values, dtype=np.int32) -> np.ndarray:
    """`values`, then zeros up to the length of a row."""
    row = np.zeros(self.length, dtype)
    row[: len(values)] = values
    return row

  def row(self, example: Any) -> dict[str, np.ndarray]:
    """What the model reads of one example."""
    raise NotImplementedError


def share_cut(lengths: Sequence[int], length: int) -> float:
  """The share of texts that are longer than a row."""
  return float(np.mean([size > length for size in lengths]))
