"""F1 of classes and of spans, counted where the model runs.

The compiled step adds up counts, so that batches, hosts and micro-batches add
as they do for a loss; the functions below turn counts into scores.

Classes: `confusion` and `macro_f1`, scikit-learn's `f1_score(average='macro')`:
the mean of the F1 of every class that is a label or a guess.

Spans: a span is right if its kind, its beginning and its end are. Tags are
IOB2, read as seqeval and the CoNLL-2003 script do: an `I-x` that follows
neither `B-x` nor `I-x` opens a span too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

OUTSIDE = 'O'


def confusion(
  guesses: Int[Array, 'B'],
  labels: Int[Array, 'B'],
  weights: Float[Array, 'B'],
  *,
  classes: int,
) -> Float[Array, 'classes classes']:
  """How often a row's label was guessed to be a column."""
  names = jnp.arange(classes)[None]
  label = (labels[:, None] == names) * weights[:, None]
  guess = guesses[:, None] == names
  return jnp.einsum('Bl,Bg->lg', label, guess.astype(jnp.float32))


def macro_f1(counts: Any) -> Any:
  """Mean F1 of the classes that occur, from `confusion`; any array type."""
  right = counts.diagonal()
  predictions, references = counts.sum(0), counts.sum(1)
  total = predictions + references
  scores = 2 * right / (total + (total == 0))
  return scores.sum() / ((total > 0).sum() + (total.sum() == 0))


class Scheme(NamedTuple):
  """What the numbers of tags mean.

  Attributes:
    opens: [C] whether it is a `B-`.
    kind: [C] number of its kind from 1; 0 is outside.
    kinds: names of the kinds, in the order of their numbers.
  """

  opens: np.ndarray
  kind: np.ndarray
  kinds: tuple[str, ...]

  @classmethod
  def of(cls, tags: Sequence[str]) -> 'Scheme':
    """Of the names of tags: `O`, `B-x`, `I-x`."""
    kinds = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    number = [0 if t == OUTSIDE else 1 + kinds.index(t[2:]) for t in tags]
    opens = [tag.startswith('B-') for tag in tags]
    return cls(np.array(opens), np.array(number, np.int32), tuple(kinds))


class Spans(NamedTuple):
  """Spans of rows of tags, by the place where each begins.

  Attributes:
    begins: whether one begins there.
    kind: the kind of the tag.
    end: place of the last tag of the span that holds it.
  """

  begins: Bool[Array, 'B W']
  kind: Int[Array, 'B W']
  end: Int[Array, 'B W']


def spans(
  tags: Int[Array, 'B W'], real: Bool[Array, 'B W'], scheme: Scheme
) -> Spans:
  """The spans of every row; what is not `real` is outside."""
  kind = jnp.where(real, jnp.asarray(scheme.kind)[tags], 0)
  opens = jnp.asarray(scheme.opens)[tags]
  before = jnp.pad(kind[:, :-1], ((0, 0), (1, 0)))
  begins = (kind > 0) & (opens | (kind != before))
  after = jnp.pad(kind[:, 1:], ((0, 0), (0, 1)))
  again = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=True)
  ends = (kind > 0) & (again | (after == 0))
  W = tags.shape[1]
  at = jnp.where(ends, jnp.arange(W)[None], W)
  return Spans(begins, kind, jax.lax.cummin(at, axis=1, reverse=True))


def count_spans(
  guesses: Int[Array, 'B W'],
  tags: Int[Array, 'B W'],
  real: Bool[Array, 'B W'],
  scheme: Scheme,
) -> Float[Array, '3 kinds']:
  """By kind: spans that are right, that were found, and that there are."""
  predictions, references = (spans(x, real, scheme) for x in (guesses, tags))
  same = (predictions.kind == references.kind) & (
    predictions.end == references.end
  )
  right = predictions.begins & references.begins & same
  names = 1 + jnp.arange(len(scheme.kinds))[None, None]

  def tally(member, kind):
    hit = member[..., None] & (kind[..., None] == names)
    return hit.sum((0, 1)).astype(jnp.float32)

  return jnp.stack([
    tally(right, references.kind),
    tally(predictions.begins, predictions.kind),
    tally(references.begins, references.kind),
  ])  # fmt: skip


def span_f1(counts: Any) -> Any:
  """F1 over all spans (micro), from `count_spans`; any array type."""
  right, predictions, references = counts.sum(1)
  return (
    2 * right / (predictions + references + (predictions + references == 0))
  )


def span_f1_by_kind(counts: np.ndarray, scheme: Scheme) -> dict[str, float]:
  """F1 of each kind that occurs."""
  return {
    name: float(2 * right / (predictions + references))
    for name, (right, predictions, references) in zip(
      scheme.kinds, counts.T, strict=True
    )
    if predictions + references
  }
