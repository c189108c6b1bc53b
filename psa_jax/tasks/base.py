"""What the one training loop needs to know of a task.

A task turns a model and a batch into a `Loss`, supplies batches, and says how
it is evaluated. Another task joins by another class of this shape (see
`registry`), not by another loop.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config
from psa_jax.data import pipeline


@dataclasses.dataclass(frozen=True)
class Stage:
  """Steps `begin` (inclusive) to `end` (exclusive) of a run: one batch shape.

  Attributes:
    index: place among the stages, from 0.
    begin, end: optimiser steps, counted from the start of the run.
    seq_len: tokens in a window.
    batch_size: windows in a step, over all devices.
    seed: of the stage's shuffle.
  """

  index: int
  begin: int
  end: int
  seq_len: int
  batch_size: int
  seed: int

  @property
  def tokens(self) -> int:
    """Tokens that one step reads."""
    return self.batch_size * self.seq_len


@runtime_checkable
class Data(Protocol):
  """What a task is made of, as its source or its `TaskSpec.load` gives it."""

  @property
  def manifest(self) -> dict[str, Any]:
    """What identifies the data; plain JSON values."""
    ...


class Loss(NamedTuple):
  """The loss of a batch in a form that adds over batches.

  Attributes:
    total: loss summed over what counts; its gradient is the run's.
    weight: how much counts (tokens, images).
    sums: other quantities that add up (bytes, hits).
    means: scalars that are averaged (attention density).
    auxiliary: what the model adds to the training loss (see `auxiliary`), in
      the unit of `total`. It is no part of any metric of the text.
  """

  total: Float[Array, '']
  weight: Float[Array, '']
  sums: dict[str, jax.Array]
  means: dict[str, jax.Array]
  auxiliary: Float[Array, ''] | float = 0.0


class Metric(NamedTuple):
  """How a metric is shown.

  Attributes:
    label: in tables.
    form: format of its value there.
    short, short_form: both beside a step; empty where they are the same.
  """

  label: str
  form: str
  short: str = ''
  short_form: str = ''


ACCURACY = Metric('accuracy', '.1%')


def auxiliary(
  aux: Mapping[str, jax.Array], weight: Float[Array, '']
) -> Float[Array, '']:
  """Sum of a model's scalars named `loss/...`, each a mean, times `weight`.

  Divided by the weight of the whole batch it is their mean again, weighted as
  the loss is, however the batch was cut into micro-batches.
  """
  losses = [value for name, value in aux.items() if name.startswith('loss/')]
  # Where nothing counts they may be NaN.
  return jnp.where(weight != 0, weight * sum(losses, jnp.float32(0)), 0)


@runtime_checkable
class Task(Protocol):
  """A training task. Batches are dicts of numpy arrays, rows first.

  Attributes:
    vocab_size: size of the model's vocabulary, or of a vision model's output.
    classes: outputs of an encoder's head; 0 for none.
    quality: name of the metric that a run is judged by.
  """

  vocab_size: int
  classes: int
  quality: str

  def loss(
    self,
    model: nnx.Module,
    batch: Mapping[str, jax.Array],
    context: AttentionContext,
  ) -> Loss:
    """The loss of one batch; pure apart from the module's statistics.

    Args:
      model: called with the context, to which the batch adds its own.
      batch: rows of a batch.
      context: step, budget, and whether training.
    """
    ...

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """What is logged of a loss, `loss` among it; traced or float64."""
    ...

  def train_iterator(self, stage: Stage) -> pipeline.DataIterator:
    """This process's rows of every batch of a stage."""
    ...

  def evaluate(
    self,
    eval_step: Callable[[Any, Any], Loss],
    state: Any,
    *,
    before_batch: Callable[[], None],
  ) -> dict[str, Any]:
    """Metrics over the validation data, `loss` and `windows` among them.

    `before_batch` may raise, to stop.
    """
    ...

  def baselines(self) -> dict[str, float]:
    """What a trivial model scores on the same data, for the final table."""
    ...


@runtime_checkable
class Generator(Protocol):
  """What a task has in addition if it is judged by what its model writes."""

  def generate(
    self,
    program: Any,
    state: Any,
    *,
    before_batch: Callable[[], None],
  ) -> dict[str, Any]:
    """Metrics of what the model writes for the judged data."""
    ...


def train_batches(
  config: Config,
  source: pipeline.Source,
  stage: Stage,
  *,
  shuffle: bool = True,
  augment: pipeline.Augment | None = None,
) -> pipeline.TrainIterator:
  """This process's share of a stage's batches of `source`, without end.

  Args:
    config: the run.
    source: windows of the train split.
    stage: says how many a batch has, and the seed.
    shuffle, augment: as in `pipeline.train_iterator`.
  """
  return pipeline.train_iterator(
    source,
    batch_size=stage.batch_size,
    seed=stage.seed,
    shuffle=shuffle,
    augment=augment,
    threads=config.data.threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def eval_batches(
  config: Config, source: pipeline.Source, mesh: Mesh
) -> pipeline.EvalBatches:
  """This process's share of `eval.windows` windows of `source`."""
  shards = sharding.batch_shards(mesh)
  rows = max(1, config.train.batch_size[-1] // config.optim.accumulate)
  return pipeline.eval_batches(
    source,
    batch_size=-(-min(rows, config.eval.windows) // shards) * shards,
    limit=config.eval.windows,
    threads=config.data.threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
