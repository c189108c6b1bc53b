"""Tagging: one tag a word, by a bidirectional encoder."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config
from psa_jax.data import sources
from psa_jax.data.examples import tagged
from psa_jax.eval import f1
from psa_jax.tasks import encoding
from psa_jax.tasks.base import ACCURACY, Loss, Metric, auxiliary
from psa_jax.tasks.losses import counted, label_loss
from psa_jax.tasks.registry import TaskSpec, register


class Tagging(encoding.Encoding):
  """One tag a word, at its first token."""

  quality = 'span_f1'
  row_type = tagged.TaggedRows

  def __init__(self, config: Config, data: tagged.TaggedSet, mesh: Mesh):
    """See `Encoding`."""
    super().__init__(config, data, mesh)
    self.classes = len(data.tags)
    self._scheme = f1.Scheme.of(data.tags)

  def text(self, example: tagged.Tagged) -> bytes:
    return ''.join(f' {word}' for word in example.words).encode()

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the tags; `spans` counts those right, found and there."""
    out = self.hidden(model, batch, context)
    tags, weights = batch['tags'], batch['weights']
    first = batch['first'][..., None]
    words = jnp.take_along_axis(out.hidden, first, axis=1)
    logits = model.label(counted(words, weights))
    smoothing = self.config.train.label_smoothing if context.train else 0.0
    total, hits = label_loss(
      logits.reshape(-1, logits.shape[-1]),
      tags.reshape(-1),
      weights.reshape(-1),
      smoothing=smoothing,
    )
    guesses = jnp.argmax(logits, -1)
    counts = f1.count_spans(guesses, tags, weights > 0, self._scheme)
    weight = jnp.sum(weights)
    sums = {'hits': hits, 'spans': counts}
    return Loss(total, weight, sums, out.aux, auxiliary(out.aux, weight))

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats a word, `accuracy` of words and `span_f1`."""
    count = loss.weight + (loss.weight == 0)
    return {
      'loss': loss.total / count,
      'accuracy': loss.sums['hits'] / count,
      'span_f1': f1.span_f1(loss.sums['spans']),
    }

  def evaluate(self, eval_step, state, *, before_batch):
    """Loss and F1 on `eval.windows` sentences of `eval.split`."""
    tally, count = self.add_up(eval_step, state, before_batch)
    spans = tally.sums['spans']
    return {
      'loss': tally.total / tally.weight,
      'accuracy': float(tally.sums['hits']) / tally.weight,
      'span_f1': float(f1.span_f1(spans)),
      'by_kind': f1.span_f1_by_kind(spans, self._scheme),
      **tally.means,
      'items': int(tally.weight),
      'windows': count,
    }

  def baselines(self) -> dict[str, float]:
    """Span F1 of the tag that each word has most often in training."""
    splits = self.data.examples
    return {
      'most frequent tag': most_frequent_tag(
        splits.train, splits.split(self.config.eval.split), self._scheme
      )
    }


def most_frequent_tag(train, judged, scheme: f1.Scheme) -> float:
  """Span F1 of a dictionary of words; a new word is outside."""
  labels_seen: dict[str, dict[int, int]] = {}
  for words, tags in train:
    for word, tag in zip(words, tags, strict=True):
      counts = labels_seen.setdefault(word, {})
      counts[tag] = counts.get(tag, 0) + 1
  outside = int(np.flatnonzero(scheme.kind == 0)[0])
  guess = {
    word: max(of, key=lambda t: of[t]) for word, of in labels_seen.items()
  }
  sentences = [judged[i] for i in range(len(judged))]
  shape = len(sentences), max(len(words) for words, _ in sentences)
  guesses, there = np.full(shape, outside), np.full(shape, outside)
  for row, (words, tags) in enumerate(sentences):
    guesses[row, : len(words)] = [guess.get(word, outside) for word in words]
    there[row, : len(words)] = tags
  # What is outside in both is no span, so padding counts nothing.
  real = np.ones(shape, bool)
  counts = f1.count_spans(*map(jnp.asarray, (guesses, there, real)), scheme)
  return float(f1.span_f1(np.asarray(counts)))


register(
  TaskSpec(
    'tagging',
    Tagging,
    models=('encoder',),
    reads=sources.TAGGED,
    metrics={'accuracy': ACCURACY, 'span_f1': Metric('span F1', '.3f')},
    keys=(*encoding.KEYS, 'data.words_key'),
  )
)
