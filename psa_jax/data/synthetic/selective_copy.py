"""Selective copying (Mamba, arXiv 2312.00752): tokens in order, gaps left out.

  .  c1 .  .  c2 .  .  .  c3 .  ASK c1 c2
                                c1  c2 c3   <- judged

N tokens lie at random places among blanks and should be written down in
order. Each token is a question of its own; its distance is that from where it
is wanted back to where it was.

Differs from there: the answers so far are part of the row, as for a language
model that writes them, and the N tokens are all different, so that the one
before says which comes next.
"""

import numpy as np
from jaxtyping import Int

from psa_jax.config import SyntheticConfig
from psa_jax.data.synthetic.parts import Made, Needs, distinct, scatter, write

_ASK, _FIRST = 1, 2


def needs(config: SyntheticConfig) -> Needs:
  """The tokens twice, the last answer being only a target, and ASK."""
  most = max(config.needles)
  return Needs(2 * most, _FIRST + most, f'2 for each of {most} tokens')


def chance(config: SyntheticConfig) -> float:
  """A token at random."""
  return 1 / (config.vocab_size - _FIRST)


def make(
  rng: np.random.Generator,
  counts: Int[np.ndarray, 'R'],
  seq_len: int,
  config: SyntheticConfig,
) -> Made:
  """A chunk of rows with `counts` tokens to copy."""
  rows, most = len(counts), max(config.needles)
  stream = np.zeros((rows, seq_len + 1), np.int64)
  asked = np.arange(most) < counts[:, None]
  tokens = distinct(rng, rows, most, _FIRST, config.vocab_size)
  ask = seq_len - counts
  depth = (config.depth_min, config.depth_max)
  positions = scatter(rng, counts, most, 1, ask, depth)
  answers = ask[:, None] + np.arange(most)
  write(stream, positions, tokens[..., None], asked)
  write(stream, answers + 1, tokens[..., None], asked)
  stream[np.arange(rows), ask] = _ASK
  return Made(
    inputs=stream[:, :-1],
    answers=np.where(asked, answers, 0)[..., None],
    targets=np.where(asked, tokens, 0)[..., None],
    asked=asked,
    facts=positions,
  )
