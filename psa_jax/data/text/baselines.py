"""Two models that cannot read context, to judge a language model against.

Both are byte level and fit on the train split. The text is the documents with
one separator before each and one at the end (as `windows.Packed`, with the byte
tokenizer); every symbol but the first is predicted, so a document costs its
bytes and its end. With c(a, b) how often b follows a and V the number of
symbols, add-one smoothed:

  unigram  p(b)   = (c(., b) + 1) / (c(., .) + V)
  bigram   p(b|a) = (c(a, b) + 1) / (c(a, .) + V)

Bits per byte is the mean of -log2 p over the predicted symbols of the
validation split; a separator counts as a byte there and in `evaluate_lm`.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int64

from psa_jax.data.text import tokenizer

_CHUNK = 2**22  # bytes counted at once


def pair_counts(
  documents: Iterable[bytes], encoder: tokenizer.ByteTokenizer
) -> Int64[np.ndarray, 'V V']:
  """How often symbol b follows symbol a: entry [a, b]."""
  size = encoder.vocab_size
  counts = np.zeros(size * size, np.int64)
  separator = np.array([tokenizer.SEPARATOR], np.int32)
  pieces, held = [separator], 0

  def count():
    stream = np.concatenate(pieces)
    pairs = stream[:-1] * size + stream[1:]
    counts[:] += np.bincount(pairs, minlength=size * size)
    return [stream[-1:]]

  for document in documents:
    pieces += [encoder.encode(document), separator]
    held += len(document) + 1
    if held >= _CHUNK:
      pieces, held = count(), 0
  count()
  return counts.reshape(size, size)


def unigram_bits_per_byte(
  train: Int64[np.ndarray, 'V V'], validation: Int64[np.ndarray, 'V V']
) -> float:
  """Bits a symbol of `validation` under symbol frequencies of `train`."""
  counts, scored = train.sum(0), validation.sum(0)
  bits = np.log2(counts.sum() + len(counts)) - np.log2(counts + 1)
  return float((scored * bits).sum() / scored.sum())


def bigram_bits_per_byte(
  train: Int64[np.ndarray, 'V V'], validation: Int64[np.ndarray, 'V V']
) -> float:
  """Bits a symbol of `validation` under pair frequencies of `train`."""
  totals = train.sum(1, keepdims=True) + len(train)
  bits = np.log2(totals) - np.log2(train + 1)
  return float((validation * bits).sum() / validation.sum())
