"""Multi-query associative recall (Zoology, arXiv 2312.04927).

A row begins with N pairs `key value key value ...`; later every key is asked
for once, and its value should follow:

  k1 v1 k2 v2 k3 v3  .  .  k2 .  k1 .  .  .  k3 .
                           v2    v1          v3     <- judged

Keys are N different ids of [1, V/2), values of [V/2, V). The gaps between the
pairs and the questions are drawn without replacement with p(i) ~ i^(a - 1),
a = 0.01, in units of two tokens, as in zoology/data/multiquery_ar.py.

Differs from there: the random tokens in the gaps are none of the row's keys,
so that there is one right answer.
"""

import numpy as np
from jaxtyping import Int

from psa_jax.config import SyntheticConfig
from psa_jax.data.synthetic.parts import Made, Needs, distinct

_POWER = 0.01


def needs(config: SyntheticConfig) -> Needs:
  """Half of the row for the pairs, and room for as many questions."""
  most = max(config.needles)
  return Needs(4 * most, 2 * most + 2, f'4 for each of {most} pairs')


def chance(config: SyntheticConfig) -> float:
  """A value at random."""
  return 1 / (config.vocab_size - config.vocab_size // 2)


def make(
  rng: np.random.Generator,
  counts: Int[np.ndarray, 'R'],
  seq_len: int,
  config: SyntheticConfig,
) -> Made:
  """A chunk of rows with `counts` pairs."""
  rows, most, half = len(counts), max(config.needles), config.vocab_size // 2
  keys = distinct(rng, rows, most, 1, half)
  values = distinct(rng, rows, most, half, config.vocab_size)
  asked = np.arange(most) < counts[:, None]
  answers = 2 * (counts[:, None] + _gaps(rng, counts, most, seq_len))
  answers = np.where(asked, answers, 0)
  inputs = np.zeros((rows, seq_len), np.int64)
  if config.noise:
    inputs = _noise(rng, keys, seq_len, config.vocab_size)
  row, pair = np.nonzero(asked)
  inputs[row, 2 * pair] = keys[row, pair]
  inputs[row, 2 * pair + 1] = values[row, pair]
  inputs[row, answers[row, pair]] = keys[row, pair]
  return Made(
    inputs=inputs,
    answers=answers[..., None],
    targets=np.where(asked, values, 0)[..., None],
    asked=asked,
    facts=np.broadcast_to(2 * np.arange(most), (rows, most)),
  )


def _gaps(rng, counts, most, seq_len):
  """[R, most] different gaps: a race of exponentials, i^(a - 1) the rates."""
  room = (seq_len - 2 * counts) // 2
  i = np.arange(seq_len // 2)
  finish = rng.standard_exponential((len(counts), len(i))) * (i + 1.0) ** (
    1 - _POWER
  )
  finish = np.where(i < room[:, None], finish, np.inf)
  return np.argsort(finish, axis=1)[:, :most]


def _noise(rng, keys, seq_len, vocab_size):
  """Ids that are none of the row's keys, each equally likely."""
  rows, most = keys.shape
  noise = rng.integers(0, vocab_size - most, (rows, seq_len))
  for key in np.sort(keys, axis=1).T:
    noise += noise >= key[:, None]
  return noise
