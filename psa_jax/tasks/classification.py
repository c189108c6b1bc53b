"""Labels of texts, and tags of words, by a bidirectional encoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config, ConfigError
from psa_jax.data import labelled, rows, tagged
from psa_jax.data.tokenizer import SEPARATOR, Tokenizer, make_tokenizer
from psa_jax.eval import f1, tfidf, totals
from psa_jax.train.losses import label_loss
from psa_jax.train.stages import DataIterator, Stage
from psa_jax.train.tasks.base import (
  Loss,
  auxiliary,
  eval_batches,
  train_batches,
)

_SAMPLE = 1000  # texts whose lengths are looked at


class _Encoding:
  """What both tasks share: an encoder, a tokenizer, rows of one length."""

  row_type: type

  def __init__(self, config: Config, data: Any, mesh: Mesh):
    """Trains the tokenizer.

    Args:
      config: the run.
      data: a set of texts with labels, or of words with tags.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a model that is no encoder, or a vocabulary smaller than the
        tokenizer's, or a split that is not there.
    """
    if config.model.kind != 'encoder':
      raise ConfigError(
        f'model.kind={config.model.kind} does not label what it reads; set '
        'model.kind=encoder'
      )
    self._config, self._data, self._mesh = config, data, mesh
    splits = data.examples
    splits.split(config.eval.split)  # refuses one that is not there
    self._tokenizer = make_tokenizer(
      config.data, (self._text(example) for example in splits.train)
    )
    self.vocab_size = fitting(config, self._tokenizer)
    longest = max(*config.train.seq_len, config.eval.seq_len)
    sample = [splits.train[i] for i in range(min(_SAMPLE, len(splits.train)))]
    texts = map(self._text, sample)
    sizes = [len(ids) for ids in self._tokenizer.encode_all(texts)]
    cut = rows.share_cut(sizes, longest)
    if cut > 0.01:
      logging.warning(
        '%.0f %% of the texts have more than the %d tokens of a row and are '
        'cut; raise train.seq_len',
        100 * cut,
        longest,
      )

  def _text(self, example: Any) -> bytes:
    raise NotImplementedError

  def _hidden(self, model, batch, context: AttentionContext):
    """The encoder's output on a batch, some tokens hidden in training."""
    tokens = batch['inputs']
    if context.train and self._config.data.word_dropout:
      key = jax.random.fold_in(jax.random.key(self._config.seed), context.step)
      tokens = hide(tokens, key, share=self._config.data.word_dropout)
    return model(
      tokens,
      context=dataclasses.replace(context, segment_ids=batch['segment_ids']),
    )

  def train_iterator(self, stage: Stage) -> DataIterator:
    """Shuffled examples, this process's rows."""
    return train_batches(
      self._config, self._rows('train', stage.seq_len), stage
    )

  def _add_up(self, eval_step, state, before_batch):
    """What the judged rows add up to, and how many there are."""
    config = self._config
    length = config.eval.seq_len or config.train.seq_len[-1]
    source = self._rows(config.eval.split, length)
    found = totals.add_up(
      eval_step,
      state,
      eval_batches(config, source, self._mesh),
      mesh=self._mesh,
      before_batch=before_batch,
      mend='there is nothing to judge in the split eval.split',
    )
    return found, min(config.eval.windows, len(source))

  def _rows(self, split: str, length: int):
    examples = self._data.examples.split(split)
    return self.row_type(examples, self._tokenizer, length)


class TextClassification(_Encoding):
  """One label a text, from the mean of its tokens."""

  quality = 'macro_f1'
  row_type = rows.LabelledRows

  def __init__(self, config: Config, data: labelled.LabelledSet, mesh: Mesh):
    """See `_Encoding`."""
    super().__init__(config, data, mesh)
    self.classes = len(data.classes)

  def _text(self, example: labelled.Labelled) -> bytes:
    return example.text

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the labels; `confusion` counts guesses by label."""
    out = self._hidden(model, batch, context)
    labels, weights = batch['labels'], batch['weights'][:, 0]
    logits = model.classify(out.hidden, batch['segment_ids'])
    smoothing = self._config.train.label_smoothing if context.train else 0.0
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
    found, count = self._add_up(eval_step, state, before_batch)
    return {
      'loss': found.total / found.weight,
      'accuracy': float(found.sums['hits']) / found.weight,
      'macro_f1': float(f1.macro_f1(found.sums['confusion'])),
      **found.means,
      'items': int(found.weight),
      'windows': count,
    }

  def baselines(self) -> dict[str, float]:
    """Macro-F1 of a linear model on words, and of the most frequent label."""
    splits, split = self._data.examples, self._config.eval.split
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


class TokenLabelling(_Encoding):
  """One tag a word, at its first token."""

  quality = 'span_f1'
  row_type = rows.TaggedRows

  def __init__(self, config: Config, data: tagged.TaggedSet, mesh: Mesh):
    """See `_Encoding`."""
    super().__init__(config, data, mesh)
    self.classes = len(data.tags)
    self._scheme = f1.Scheme.of(data.tags)

  def _text(self, example: tagged.Tagged) -> bytes:
    return ''.join(f' {word}' for word in example.words).encode()

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the tags; `spans` counts those right, found and there."""
    out = self._hidden(model, batch, context)
    tags, weights = batch['tags'], batch['weights']
    first = batch['first'][..., None]
    logits = model.label(jnp.take_along_axis(out.hidden, first, axis=1))
    smoothing = self._config.train.label_smoothing if context.train else 0.0
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
    found, count = self._add_up(eval_step, state, before_batch)
    spans = found.sums['spans']
    return {
      'loss': found.total / found.weight,
      'accuracy': float(found.sums['hits']) / found.weight,
      'span_f1': float(f1.span_f1(spans)),
      'by_kind': f1.span_f1_by_kind(spans, self._scheme),
      **found.means,
      'items': int(found.weight),
      'windows': count,
    }

  def baselines(self) -> dict[str, float]:
    """Span F1 of the tag that each word has most often in training."""
    splits = self._data.examples
    return {
      'most frequent tag': most_frequent_tag(
        splits.train, splits.split(self._config.eval.split), self._scheme
      )
    }


def most_frequent_tag(train, judged, scheme: f1.Scheme) -> float:
  """Span F1 of a dictionary of words; a new word is outside."""
  seen: dict[str, dict[int, int]] = {}
  for words, tags in train:
    for word, tag in zip(words, tags, strict=True):
      own = seen.setdefault(word, {})
      own[tag] = own.get(tag, 0) + 1
  outside = int(np.flatnonzero(scheme.kind == 0)[0])
  guess = {word: max(own, key=lambda t: own[t]) for word, own in seen.items()}
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


def hide(
  tokens: Int[Array, 'B T'], key: jax.Array, *, share: float
) -> Int[Array, 'B T']:
  """A share of the tokens becomes `SEPARATOR`, each for itself.

  Word dropout (arXiv 1511.06349, section 3.1), at the input of an encoder.
  """
  hidden = jax.random.bernoulli(key, share, tokens.shape)
  return jnp.where(hidden, SEPARATOR, tokens)


def fitting(config: Config, tokenizer: Tokenizer) -> int:
  """V of the model.

  Raises:
    ConfigError: `model.vocab_size` is smaller than the tokenizer's.
  """
  size = config.model.vocab_size or tokenizer.vocab_size
  if size < tokenizer.vocab_size:
    raise ConfigError(
      f'model.vocab_size={size} is below the {tokenizer.vocab_size} of the '
      'tokenizer; set it to 0 to take those'
    )
  return size
