"""Accuracy of recall tasks: by distance, by depth, by number of needles.

A question counts as answered when all of its tokens are right. The compiled
step adds hits and questions up into buckets (`tally`), so that batches, hosts
and micro-batches add as they do for a loss; `evaluate_recall` reads them.

Distance is from the answer back to the fact, in buckets that double. Depth is
where the fact lies in the text before the question, 0 at the beginning.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from psa_jax.eval import totals

_FIRST_DISTANCE = 16
_DEPTHS = 5


@dataclasses.dataclass(frozen=True)
class Buckets:
  """What questions are counted by.

  Attributes:
    distances: first distance of each bucket, from 0 on.
    needles: numbers of needles, rising.
  """

  distances: tuple[int, ...]
  needles: tuple[int, ...]

  def labels(self) -> dict[str, tuple[str, ...]]:
    """What each bucket is called."""
    ends = [*self.distances[1:], None]
    spans = zip(self.distances, ends, strict=True)
    share = 100 // _DEPTHS
    return {
      'distance': tuple(
        f'{low} or more' if high is None else f'{low} to {high - 1}'
        for low, high in spans
      ),
      'depth': tuple(
        f'{share * i} to {share * (i + 1)} %' for i in range(_DEPTHS)
      ),
      'needles': tuple(map(str, self.needles)),
    }


def buckets(*, seq_len: int, needles: Iterable[int]) -> Buckets:
  """Buckets for rows of `seq_len` tokens; distances 0, 16, 32, 64, ..."""
  distances, edge = [0], _FIRST_DISTANCE
  while edge < seq_len:
    distances.append(edge)
    edge *= 2
  return Buckets(tuple(distances), tuple(sorted(set(needles))))


def tally(
  hits: Bool[Array, 'B Q'],
  asked: Float[Array, 'B Q'],
  *,
  distances: Int[Array, 'B Q'],
  positions: Int[Array, 'B Q'],
  needles: Int[Array, 'B'],
  by: Buckets,
) -> dict[str, Float[Array, '2 _']]:
  """Hits and questions in each bucket.

  Args:
    hits: whether a question was answered.
    asked: 1 where there is a question, 0 elsewhere.
    distances: from the fact to the answer.
    positions: of the answers.
    needles: facts in each row.
    by: the buckets.
  """
  edges = jnp.array(by.distances)[None, None, :]
  distance = (distances[..., None] >= edges).sum(-1) - 1
  place = (positions - distances) * _DEPTHS // jnp.maximum(positions, 1)
  depth = jnp.clip(place, 0, _DEPTHS - 1)
  counts = jnp.array(by.needles)
  number = (needles[:, None] > counts[None, :]).sum(-1)
  number = jnp.broadcast_to(number[:, None], asked.shape)
  return {
    'distance': _count(distance, len(by.distances), hits, asked),
    'depth': _count(depth, _DEPTHS, hits, asked),
    'needles': _count(number, len(by.needles), hits, asked),
  }


def _count(bucket, size, hits, asked):
  member = (bucket[..., None] == jnp.arange(size)[None, None, :]) * asked[
    ..., None
  ]
  return jnp.stack([(member * hits[..., None]).sum((0, 1)), member.sum((0, 1))])


def evaluate_recall(
  eval_step: Callable[[Any, Any], Any],
  state: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  mesh: jax.sharding.Mesh,
  by: Buckets,
  before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Adds what all batches count, in float64.

  Args:
    eval_step: `(state, batch)` to a `tasks.Loss` with `hits`,
      `questions` and a `tally` in its sums.
    state: the train state; it stays alive.
    batches: this process's rows of every batch.
    mesh: devices that share the rows.
    by: the buckets of the tally.
    before_batch: may raise, to stop here.

  Returns:
    `loss` in nats per answer token, `accuracy`, `questions`, what the model
    reports, and `by`: for distance, depth and needles a list of (label,
    questions, accuracy).

  Raises:
    RunError: no question counts.
  """
  result = totals.add_up(
    eval_step,
    state,
    batches,
    mesh=mesh,
    before_batch=before_batch,
    hint='there is no question to evaluate; raise eval.windows',
  )
  sums = result.sums
  return {
    'loss': result.total / result.weight,
    'accuracy': float(sums['hits'] / sums['questions']),
    **result.means,
    'questions': int(sums['questions']),
    'by': {
      kind: [
        [label, int(asked), float(hit / asked) if asked else None]
        for label, hit, asked in zip(names, *sums[kind], strict=True)
      ]
      for kind, names in by.labels().items()
    },
  }


def table(validation: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
  """Rows of accuracy by bucket, a column for each attention mechanism.

  Args:
    validation: what `evaluate_recall` found, by mechanism; other findings
      give no rows.
  """
  scores_by = {m: v['by'] for m, v in validation.items() if 'by' in v}
  if not scores_by:
    return []
  rows = []
  first = next(iter(scores_by.values()))
  for kind, buckets_of_kind in first.items():
    for i, (label, asked, _) in enumerate(buckets_of_kind):
      if asked:
        scores = [f'{m} {by[kind][i][2]:6.1%}' for m, by in scores_by.items()]
        rows.append((f'{kind} {label}, {asked:,} questions', '  '.join(scores)))
  return rows
