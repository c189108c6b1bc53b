"""What the recall tasks share: the form of a chunk, and random choices."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Needs(NamedTuple):
  """The least that a task can be made of.

  Attributes:
    tokens: length of a row.
    vocab_size: ids.
    why: what takes the tokens, in words.
  """

  tokens: int
  vocab_size: int
  why: str


class Made(NamedTuple):
  """A chunk of R rows; see `synthetic.Rows`.

  Attributes:
    inputs: the rows.
    answers: positions whose logits are judged.
    targets: what should follow there.
    asked: which questions exist.
    facts: where the fact is that a question asks for.
  """

  inputs: Int[np.ndarray, 'R T']
  answers: Int[np.ndarray, 'R Q L']
  targets: Int[np.ndarray, 'R Q L']
  asked: Bool[np.ndarray, 'R Q']
  facts: Int[np.ndarray, 'R Q']

  def distances(self) -> Int[np.ndarray, 'R Q']:
    """Tokens from the fact to the place where its answer is wanted."""
    return np.where(self.asked, self.answers[..., 0] - self.facts, 0)


def distinct(
  rng: np.random.Generator, rows: int, count: int, low: int, high: int
) -> Int[np.ndarray, 'R count']:
  """`count` different ids of [low, high) a row, in random order."""
  keys = rng.random((rows, high - low), np.float32)
  if count < high - low:
    chosen = np.argpartition(keys, count - 1, axis=1)[:, :count]
  else:
    chosen = np.broadcast_to(np.arange(count), (rows, count))
  order = np.argsort(np.take_along_axis(keys, chosen, 1), axis=1)
  return low + np.take_along_axis(chosen, order, 1)


def scatter(
  rng: np.random.Generator,
  counts: Int[np.ndarray, 'R'],
  most: int,
  width: int,
  room: Int[np.ndarray, 'R'],
  depth: tuple[float, float] = (0.0, 1.0),
) -> Int[np.ndarray, 'R most']:
  """Rising starts of pieces of `width` tokens that do not overlap.

  Args:
    rng: the chunk's.
    counts: pieces in each row.
    most: columns; those from a row's count on hold `room`, past its text.
    width: tokens of a piece.
    room: tokens of each row that may be used.
    depth: where in the free room they lie, as shares.
  """
  free = room - counts * width
  u = depth[0] + (depth[1] - depth[0]) * rng.random((len(counts), most))
  place = np.floor(u * (free + 1)[:, None]).astype(np.int64)
  place = np.minimum(place, free[:, None])
  exists = np.arange(most) < counts[:, None]
  place = np.sort(np.where(exists, place, np.iinfo(np.int64).max), axis=1)
  starts = place + width * np.arange(most)
  return np.where(exists, starts, room[:, None])


def write(
  stream: Int[np.ndarray, 'R t'],
  starts: Int[np.ndarray, 'R P'],
  pieces: Int[np.ndarray, 'R P W'],
  exists: Bool[np.ndarray, 'R P'],
) -> None:
  """Writes pieces of tokens into the rows of `stream`, where they exist."""
  rows, which = np.nonzero(exists)
  at = starts[rows, which][:, None] + np.arange(pieces.shape[-1])
  stream[rows[:, None], at] = pieces[rows, which]
