"""Text classification: one label a text, by a bidirectional encoder."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config
from psa_jax.data import sources
from psa_jax.data.examples import labelled
from psa_jax.eval import f1, tfidf
from psa_jax.tasks import encoding
from psa_jax.tasks.base import ACCURACY, Loss, Metric, auxiliary
from psa_jax.tasks.losses import counted, label_loss
from psa_jax.tasks.registry import TaskSpec, register


class TextClassification(encoding.Encoding):
  """One label a text, from the mean of its tokens."""

  quality = 'macro_f1'
  row_type = labelled.LabelledRows

  def __init__(self, config: Config, data: labelled.LabelledSet, mesh: Mesh):
    """See `Encoding`."""
    super().__init__(config, data, mesh)
    self.classes = len(data.classes)

  def text(self, example: labelled.Labelled) -> bytes:
    return example.text

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the labels; `confusion` counts guesses by label."""
    out = self.hidden(model, batch, context)
    labels, weights = batch['labels'], batch['weights'][:, 0]
    hidden = counted(out.hidden, weights[:, None])
    logits = model.classify(hidden, batch['segment_ids'])
    smoothing = self.config.train.label_smoothing if context.train else 0.0
    total, hits = label_loss(logits, labels, weights, smoothing=smoothing)
    guesses = jnp.argmax(logits, -1)
    counts = f1.confusion(guesses, labels, weights, classes=self.classes)
    weight = jnp.sum(weights)
    sums = {'hits': hits, 'confusion': counts}
    return Loss(total, weight, sums, out.aux, auxiliary(out.aux, weight))

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats a text, `accuracy` and `macro_f1`."""
    count = loss.weight + (loss.weight == 0)
    return {
      'loss': loss.total / count,
      'accuracy': loss.sums['hits'] / count,
      'macro_f1': f1.macro_f1(loss.sums['confusion']),
    }

  def evaluate(self, eval_step, state, *, before_batch):
    """Loss, accuracy and macro-F1 on `eval.windows` texts of `eval.split`."""
    tally, count = self.add_up(eval_step, state, before_batch)
    return {
      'loss': tally.total / tally.weight,
      'accuracy': float(tally.sums['hits']) / tally.weight,
      'macro_f1': float(f1.macro_f1(tally.sums['confusion'])),
      **tally.means,
      'items': int(tally.weight),
      'windows': count,
    }

  def baselines(self) -> dict[str, float]:
    """Macro-F1 of a linear model on words, and of the most frequent label."""
    splits, split = self.data.examples, self.config.eval.split
    train = [splits.train[i] for i in range(min(tfidf.MOST, len(splits.train)))]
    judged = splits.split(split)
    judged = [judged[i] for i in range(min(tfidf.MOST, len(judged)))]
    (texts, known), (unseen, labels) = (
      ([x.text for x in part], [x.label for x in part])
      for part in (train, judged)
    )
    common = np.bincount(known, minlength=self.classes).argmax()
    counts = np.zeros((self.classes, self.classes))
    counts[:, common] = np.bincount(labels, minlength=self.classes)
    return {
      'TF-IDF': tfidf.macro_f1((texts, known), (unseen, labels)),
      'majority': float(f1.macro_f1(counts)),
    }


register(
  TaskSpec(
    'classification',
    TextClassification,
    models=('encoder',),
    reads=sources.LABELLED,
    metrics={'accuracy': ACCURACY, 'macro_f1': Metric('macro-F1', '.3f')},
    keys=encoding.KEYS,
  )
)
