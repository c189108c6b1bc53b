"""What the batches of an evaluation add up to, in float64."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from psa_jax import sharding
from psa_jax.config import RunError


class Totals(NamedTuple):
  """Sums over batches.

  Attributes:
    total: summed loss.
    weight: what counted.
    sums: the task's other quantities.
    means: what the model reports, averaged over batches by their weight.
  """

  total: float
  weight: float
  sums: dict[str, Any]
  means: dict[str, float]


def add_up(
  eval_step: Callable[[Any, Any], Any],
  state: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  mesh: jax.sharding.Mesh,
  before_batch: Callable[[], None] = lambda: None,
  hint: str,
) -> Totals:
  """Adds the losses of all batches.

  Args:
    eval_step: `(state, batch)` to a `tasks.Loss`.
    state: the train state; it stays alive.
    batches: this process's rows of every batch.
    mesh: devices that share the rows.
    before_batch: may raise, to stop here.
    hint: what to do where nothing counts.

  Raises:
    RunError: nothing counts.
  """
  total = weight = 0.0
  sums: dict[str, Any] = {}
  means: dict[str, float] = {}
  for batch in batches:
    before_batch()
    loss = jax.device_get(eval_step(state, sharding.put_batch(batch, mesh)))
    weight_of_batch = float(loss.weight)
    total, weight = total + float(loss.total), weight + weight_of_batch
    for name, value in loss.sums.items():
      sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    for name, value in loss.means.items():
      # Of a batch in which nothing counts they may be NaN.
      share = weight_of_batch * float(value) if weight_of_batch else 0.0
      means[name] = means.get(name, 0.0) + share
  if not weight:
    raise RunError(hint)
  means = {name: value / weight for name, value in means.items()}
  return Totals(total, weight, sums, means)
