"""Quality of a language model on held-out text.

Bits per byte is the model's code length for the text divided by the text's
size, so it compares models with different tokenizers:
sum of -log2 p(token) / sum of the bytes that the tokens stand for.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from psa_jax.eval import totals

_LN2 = float(np.log(2.0))


def language_metrics(nats: Any, tokens: Any, num_bytes: Any) -> dict[str, Any]:
  """Loss per token in nats, and bits per byte; of numbers or of arrays.

  Args:
    nats: sum of -log p(token).
    tokens: how many tokens that is; 0 gives a loss of 0.
    num_bytes: how many bytes they stand for.
  """
  return {
    'loss': nats / (tokens + (tokens == 0)),
    'bits_per_byte': nats / (num_bytes + (num_bytes == 0)) / _LN2,
  }


def evaluate_lm(
  eval_step: Callable[[Any, Any], Any],
  state: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  mesh: jax.sharding.Mesh,
  before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Adds the losses of all batches in float64.

  Args:
    eval_step: `(state, batch)` to a `tasks.Loss` with `bytes` in its
      sums.
    state: the train state; it stays alive.
    batches: this process's rows of every batch.
    mesh: devices that share the rows.
    before_batch: may raise, to stop here.

  Returns:
    `loss`, `bits_per_byte`, `tokens`, and what the model reports, averaged
    over batches by their tokens.

  Raises:
    RunError: no validation token counts.
  """
  result = totals.add_up(
    eval_step,
    state,
    batches,
    mesh=mesh,
    before_batch=before_batch,
    hint='there is no validation token: the validation split has no window of '
    'this length; shorten eval.seq_len or use more text',
  )
  size = float(result.sums['bytes'])
  return {
    **language_metrics(result.total, result.weight, size),
    **result.means,
    'tokens': int(result.weight),
  }
