"""Questions made on the fly; `data/synthetic` has the tasks."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config, ConfigError
from psa_jax.data import pipeline, sources, synthetic
from psa_jax.eval import recall
from psa_jax.tasks.base import (
  ACCURACY,
  Loss,
  Stage,
  auxiliary,
  eval_batches,
  train_batches,
)
from psa_jax.tasks.losses import answer_loss
from psa_jax.tasks.registry import TaskSpec, register


class Recall:
  """Questions about facts that lie far back; only the answers count."""

  quality = 'accuracy'
  classes = 0

  def __init__(self, config: Config, data: synthetic.Recall, mesh: Mesh):
    """Looks at the task.

    Args:
      config: the run.
      data: from `load`.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a vocabulary smaller than the task's.
    """
    size = data.config.vocab_size
    self.vocab_size = config.model.vocab_size or size
    if self.vocab_size < size:
      raise ConfigError(
        f'model.vocab_size={self.vocab_size} is below '
        f'data.synthetic.vocab_size={size}; set it to 0 to take those'
      )
    self._config, self._data, self._mesh = config, data, mesh
    self._buckets = recall.buckets(
      seq_len=max(*config.train.seq_len, config.eval.seq_len),
      needles=data.config.needles,
    )

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the answers; `hits` are questions that are wholly right."""
    out = model(batch['inputs'], context=context)
    answers, asked = batch['answers'], batch['weights']
    total, weight, hits = answer_loss(
      model, out.hidden, answers, batch['targets'], asked
    )
    sums = recall.tally(
      hits,
      asked,
      distances=batch['distances'],
      positions=answers[..., 0],
      needles=batch['needles'],
      by=self._buckets,
    )
    sums |= {'hits': jnp.sum(hits * asked), 'questions': jnp.sum(asked)}
    return Loss(total, weight, sums, out.aux, auxiliary(out.aux, weight))

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats per answer token and `accuracy` over questions."""
    questions = loss.sums['questions']
    return {
      'loss': loss.total / (loss.weight + (loss.weight == 0)),
      'accuracy': loss.sums['hits'] / (questions + (questions == 0)),
    }

  def train_iterator(self, stage: Stage) -> pipeline.DataIterator:
    """Rows of the stage's length, each seen once."""
    return train_batches(
      self._config,
      self._data.train(seq_len=stage.seq_len, seed=stage.seed),
      stage,
      shuffle=False,
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Accuracy (see `eval.recall`) on `eval.windows` rows."""
    config = self._config
    rows = self._data.validation(
      seq_len=config.eval.seq_len or config.train.seq_len[-1],
      rows=config.eval.windows,
    )
    scores = recall.evaluate_recall(
      eval_step,
      state,
      eval_batches(config, rows, self._mesh),
      mesh=self._mesh,
      by=self._buckets,
      before_batch=before_batch,
    )
    return {**scores, 'windows': config.eval.windows}

  def baselines(self) -> dict[str, float]:
    """Accuracy of guessing."""
    return {'chance': self._data.chance()}


def load(config: Config) -> synthetic.Recall:
  """The questions of `data.source`.

  Raises:
    ConfigError: they do not fit into the run's sequences or vocabulary.
  """
  return sources.load(config.data, sources.QUESTIONS).fitted(config)


register(
  TaskSpec(
    'recall',
    Recall,
    models=('decoder_lm',),
    reads=sources.QUESTIONS,
    metrics={'accuracy': ACCURACY},
    load=load,
  )
)
