"""Quality of a classifier: accuracy and loss."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from psa_jax.eval import totals


def metrics(nats: Any, hits: Any, count: Any) -> dict[str, Any]:
  """Loss in nats an item, and accuracy; of numbers or of arrays.

  Args:
    nats: sum of -log p(label).
    hits: how many labels were most likely.
    count: of items; 0 gives a loss and an accuracy of 0.
  """
  count = count + (count == 0)
  return {'loss': nats / count, 'accuracy': hits / count}


def evaluate(
  eval_step: Callable[[Any, Any], Any],
  state: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  mesh: jax.sharding.Mesh,
  before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Adds what all batches count, in float64.

  Args:
    eval_step: `(state, batch)` to a `tasks.Loss` with `hits` in its sums.
    state: the train state; it stays alive.
    batches: this process's rows of every batch.
    mesh: devices that share the rows.
    before_batch: may raise, to stop here.

  Returns:
    `loss`, `accuracy`, `items`, and what the model reports, averaged over
    batches by their items.

  Raises:
    RunError: nothing to judge.
  """
  result = totals.add_up(
    eval_step,
    state,
    batches,
    mesh=mesh,
    before_batch=before_batch,
    hint='there is nothing to judge in the split eval.split',
  )
  return {
    **metrics(result.total, float(result.sums['hits']), result.weight),
    **result.means,
    'items': int(result.weight),
  }
