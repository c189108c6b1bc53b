"""Variable tracking (RULER, arXiv 2404.06654): which variables hold a value.

Chains of assignments lie in random noise, each in order, mixed with the
others. `SET x y` means x = y. At the end one chain is asked for by its value,
and its variables should follow in order:

  SET x1 7  noise  SET y1 9  noise  SET x2 x1  noise  SET y2 y1  ASK 7  x1
                                                                     x1 x2

Each variable is a question of its own; its distance is that to its
assignment. The other chains distract; "needles" counts all of them.

Differs from there: tokens in place of words, the noise has a vocabulary of
its own, and the answers so far are part of the row, as for a language model.
"""

import numpy as np
from jaxtyping import Int

from psa_jax.config import SyntheticConfig
from psa_jax.data.synthetic.parts import Made, Needs, distinct, scatter, write

_SET, _ASK, _FIRST = 1, 2, 3
_WIDTH = 3


def needs(config: SyntheticConfig) -> Needs:
  """All assignments and the question."""
  chains, links = max(config.needles), config.hops + 1
  return Needs(
    _WIDTH * chains * links + links + 1,
    _FIRST + 2 * chains * (links + 1),
    f'{chains} chains of {links} assignments, and the question',
  )


def chance(config: SyntheticConfig) -> float:
  """A variable at random."""
  return 1 / _names(config)


def make(
  rng: np.random.Generator,
  counts: Int[np.ndarray, 'R'],
  seq_len: int,
  config: SyntheticConfig,
) -> Made:
  """A chunk of rows with `counts` chains."""
  rows, most, links = len(counts), max(config.needles), config.hops + 1
  low = _FIRST + _names(config)
  stream = rng.integers(low, config.vocab_size, (rows, seq_len + 1))
  # Of every chain its value, then its variables.
  names = distinct(rng, rows, most * (links + 1), _FIRST, low)
  names = names.reshape(rows, most, links + 1)
  text = seq_len + 1 - (links + 2)
  room = np.full(rows, text)
  starts = scatter(rng, counts * links, most * links, _WIDTH, room)
  chain, link, exists = _deal(rng, counts, most, links)
  row = np.arange(rows)[:, None]
  pieces = np.full((*chain.shape, _WIDTH), _SET)
  pieces[..., 1] = names[row, chain, link + 1]
  pieces[..., 2] = names[row, chain, link]
  write(stream, starts, pieces, exists)
  which = rng.integers(0, counts)
  stream[:, text] = _ASK
  stream[:, text + 1 :] = names[np.arange(rows), which]
  answers = np.broadcast_to(text + 1 + np.arange(links), (rows, links))
  mine = exists & (chain == which[:, None])
  facts = starts[mine].reshape(rows, links)
  return Made(
    inputs=stream[:, :-1],
    answers=answers[..., None],
    targets=names[np.arange(rows), which][:, 1:, None],
    asked=np.ones((rows, links), bool),
    facts=facts,
  )


def _deal(rng, counts, most, links):
  """Which chain and which of its links each place of a row takes."""
  slots = np.arange(most * links)
  exists = slots < (counts * links)[:, None]
  order = np.where(exists, rng.random(exists.shape), 2)
  chain = np.argsort(order, axis=1) // links
  same = chain[:, :, None] == chain[:, None, :]
  link = (same & (slots[:, None] > slots)).sum(-1)
  return chain, link, exists


def _names(config):
  """Ids of variables and values; the noise has the other half."""
  return (config.vocab_size - _FIRST) // 2
