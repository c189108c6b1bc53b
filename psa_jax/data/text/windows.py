"""A split of packed tokens, and the windows a language model reads of it.

A split is one array: each document after a separator (id 0), one separator at
the end. The separator opens its document and is also what ends the one
before, so the last token of a document predicts "it ends here", which depends
on that document alone. For this reason no target needs weight 0 where
attention is cut between documents.

Windows do not overlap: window i predicts tokens i*T + 1 to (i + 1)*T.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from psa_jax.config import ConfigError


@dataclass(frozen=True)
class Packed:
  """One split as tokens.

  Attributes:
    tokens: ids, of the smallest unsigned type that holds the vocabulary.
    doc_starts: ascending positions of the separators that open a document.
    split: `train` or `validation`.
  """

  tokens: Integer[np.ndarray, 'tokens']
  doc_starts: Int64[np.ndarray, 'documents']
  split: str


class Windows:
  """Random access to the windows of a split; see `windows`."""

  def __init__(self, packed: Packed, seq_len: int, cut_documents: bool):
    self._packed = packed
    self._seq_len = seq_len
    self._cut_documents = cut_documents
    full, rest = divmod(len(packed.tokens) - 1, seq_len)
    keep_rest = packed.split != 'train' and rest > 0
    self._len = full + keep_rest

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i) -> dict[str, np.ndarray]:
    if not 0 <= i < self._len:
      raise IndexError(f'window {i} of {self._len}')
    begin, seq_len = int(i) * self._seq_len, self._seq_len
    tokens = np.zeros(seq_len + 1, np.int32)  # zeros pad the last window
    taken = self._packed.tokens[begin : begin + seq_len + 1]
    tokens[: len(taken)] = taken
    segment_ids, positions = self._segments(begin)
    real = np.arange(seq_len) < len(taken) - 1
    return {
      'inputs': np.where(real, tokens[:-1], 0),
      'targets': np.where(real, tokens[1:], 0),
      'segment_ids': np.where(real, segment_ids, 0),
      'positions': np.where(real, positions, 0),
      'weights': real.astype(np.float32),
    }

  def _segments(self, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """Which document each token belongs to, and its place therein."""
    positions = np.arange(self._seq_len, dtype=np.int32)
    starts = np.zeros(self._seq_len, np.int32)
    if self._cut_documents:
      all_starts, end = self._packed.doc_starts, begin + self._seq_len
      first, last = np.searchsorted(all_starts, [begin + 1, end])
      starts[all_starts[first:last] - begin] = 1
    segment_ids = 1 + np.cumsum(starts, dtype=np.int32)
    return segment_ids, positions - np.maximum.accumulate(positions * starts)


def windows(packed: Packed, *, seq_len: int, cut_documents: bool) -> Windows:
  """Cuts a split into windows of `seq_len` targets.

  Train drops the tokens after the last full window. Validation keeps them in
  a last window padded with weight 0, so every token of it is judged once.

  Args:
    packed: the split.
    seq_len: T.
    cut_documents: number the documents of a window 1, 2, ... in `segment_ids`
      and restart `positions` in each; otherwise the window is one segment
      with positions 0 to T - 1.

  Returns:
    A sequence of dict(inputs, targets, segment_ids, positions: int32 [T],
    weights: f32 [T]). Padding has segment 0, position 0 and weight 0.

  Raises:
    ConfigError: the train split is shorter than a window and one target.
  """
  if seq_len < 1:
    raise ConfigError(f'a window of {seq_len} tokens; use at least 1')
  if packed.split == 'train' and len(packed.tokens) <= seq_len:
    raise ConfigError(
      f'a window of {seq_len} tokens needs {seq_len + 1}, but the train split '
      f'has {len(packed.tokens)} in {len(packed.doc_starts)} documents; use a '
      'shorter train.seq_len or more text'
    )
  return Windows(packed, seq_len, cut_documents)
