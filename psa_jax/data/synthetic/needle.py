"""Needles in a haystack by depth; with one needle it is the passkey task.

Needles `MARK key v1 .. vL` lie anywhere in random noise; at the end every one
is asked for, in random order, by its key:

  noise  MARK k1 v1..vL  noise  MARK k2 v1..vL  noise  ASK k2 v1..vL  ASK k1 ..

All L tokens must be right. The answers are part of the row, as if the model
had written them: a question counts only if every token was right given the
ones before, so the judgement is that of greedy decoding.

After the passkey of Landmark Attention (arXiv 2305.16300) and the multi-key
needles of RULER (arXiv 2404.06654), with tokens in place of words. The value
tokens of a row are all different, and the noise has a vocabulary of its own.
"""

import numpy as np
from jaxtyping import Int

from psa_jax.config import SyntheticConfig
from psa_jax.data.synthetic.parts import Made, Needs, distinct, scatter, write

_MARK, _ASK, _FIRST = 1, 2, 3


def needs(config: SyntheticConfig) -> Needs:
  """Every needle, its question, and one token of noise."""
  most, width = max(config.needles), config.value_len + 2
  quarter = max(most, most * config.value_len)
  return Needs(
    2 * most * width,
    _FIRST + 4 * quarter,
    f'{most} needles of {width} and as many questions',
  )


def chance(config: SyntheticConfig) -> float:
  """All of a value's tokens at random."""
  return (1 / _quarter(config)) ** config.value_len


def make(
  rng: np.random.Generator,
  counts: Int[np.ndarray, 'R'],
  seq_len: int,
  config: SyntheticConfig,
) -> Made:
  """A chunk of rows with `counts` needles."""
  rows, most, quarter = len(counts), max(config.needles), _quarter(config)
  width = config.value_len + 2
  low = _FIRST + 2 * quarter
  # One token more than the row: the last answer is only a target.
  stream = rng.integers(low, config.vocab_size, (rows, seq_len + 1))
  asked = np.arange(most) < counts[:, None]
  pieces = np.full((rows, most, width), _MARK)
  pieces[..., 1] = distinct(rng, rows, most, _FIRST, _FIRST + quarter)
  pieces[..., 2:] = distinct(
    rng, rows, most * config.value_len, _FIRST + quarter, low
  ).reshape(rows, most, -1)
  text = seq_len + 1 - counts * width
  depth = (config.depth_min, config.depth_max)
  starts = scatter(rng, counts, most, width, text, depth)
  write(stream, starts, pieces, asked)
  # Questions in random order: the needles of a row, shuffled.
  order = np.argsort(np.where(asked, rng.random((rows, most)), 2), axis=1)
  pieces = np.take_along_axis(pieces, order[..., None], 1)
  pieces[..., 0] = _ASK
  questions = text[:, None] + width * np.arange(most)
  write(stream, questions, pieces, asked)
  answers = questions[..., None] + 1 + np.arange(config.value_len)
  return Made(
    inputs=stream[:, :-1],
    answers=np.where(asked[..., None], answers, 0),
    targets=np.where(asked[..., None], pieces[..., 2:], 0),
    asked=asked,
    facts=np.take_along_axis(starts, order, 1),
  )


def _quarter(config):
  """Ids of keys, and of values; the noise has the other half."""
  return (config.vocab_size - _FIRST) // 4
