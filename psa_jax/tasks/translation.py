"""Translation by an encoder and a decoder."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, Config
from psa_jax.data import pipeline, sources
from psa_jax.data.examples.pairs import PairRows, PairSet
from psa_jax.data.text.tokenizer import SEPARATOR, make_tokenizer
from psa_jax.eval import beam, totals
from psa_jax.models.encoder_decoder import Decoding
from psa_jax.tasks.base import (
  Loss,
  Metric,
  Stage,
  auxiliary,
  eval_batches,
  train_batches,
)
from psa_jax.tasks.encoding import fitting_vocabulary
from psa_jax.tasks.losses import counted, label_loss, next_token_loss
from psa_jax.tasks.registry import TaskSpec, register

_SAMPLES = 3  # translations that are kept to be looked at


class Translation:
  """The next token of a translation; judged by BLEU of what it writes."""

  quality = 'bleu'
  classes = 0

  def __init__(self, config: Config, data: PairSet, mesh: Mesh):
    """Trains the tokenizer, one for both languages.

    Args:
      config: the run.
      data: pairs of texts.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a vocabulary smaller than the tokenizer's, or a split that
        is not there.
    """
    self._config, self._data, self._mesh = config, data, mesh
    data.examples.split(config.eval.split)  # refuses one that is not there
    train = data.examples.train
    self._tokenizer = make_tokenizer(
      config.data, (text for pair in train for text in pair)
    )
    self.vocab_size = fitting_vocabulary(config, self._tokenizer)
    self._translators: dict[AttentionConfig, Any] = {}

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the next tokens, smoothed in training."""
    out = model(
      batch['inputs'],
      source=batch['source'],
      source_ids=batch['source_ids'],
      context=dataclasses.replace(context, mask=batch['weights']),
    )
    smoothing = self._config.train.label_smoothing if context.train else 0.0
    targets, weights = batch['targets'], batch['weights']
    if smoothing:
      logits = model.unembed(counted(out.hidden, weights))
      total, _ = label_loss(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        weights.reshape(-1),
        smoothing=smoothing,
      )
      weight = jnp.sum(weights)
    else:
      chunk = self._config.train.loss_chunk
      total, weight = next_token_loss(
        model, out.hidden, targets, weights, chunk=chunk
      )
    return Loss(total, weight, {}, out.aux, auxiliary(out.aux, weight))

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats a token."""
    return {'loss': loss.total / (loss.weight + (loss.weight == 0))}

  def train_iterator(self, stage: Stage) -> pipeline.DataIterator:
    """Shuffled pairs, this process's rows."""
    return train_batches(
      self._config, self._rows('train', stage.seq_len), stage
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Loss on `eval.windows` pairs of `eval.split`."""
    tally = totals.add_up(
      eval_step,
      state,
      self._batches(),
      mesh=self._mesh,
      before_batch=before_batch,
      hint='there is nothing to judge in the split eval.split',
    )
    return {
      'loss': tally.total / tally.weight,
      **tally.means,
      'tokens': int(tally.weight),
      'windows': self._count(),
    }

  def generate(self, program, state, *, before_batch) -> dict[str, Any]:
    """BLEU of the translations of the same pairs.

    Returns:
      `bleu` with sacrebleu's `bleu_signature`, `seconds_per_translation`
      without compilation, and some `samples`: source, reference, translation.
    """
    from sacrebleu.metrics import BLEU

    attention = program.config.model.attention
    if attention not in self._translators:
      self._translators[attention] = self._translator(program)
    translate, seconds, written = self._translators[attention], 0.0, []
    compiled = None
    for batch in self._batches():
      before_batch()
      # Windows that only fill a batch have weight 0 everywhere.
      real = batch['weights'].any(1)
      texts = sharding.put_batch(
        {name: batch[name] for name in ('source', 'source_ids')}, self._mesh
      )
      if compiled is None:
        compiled = translate.lower(state, texts).compile()
      began = time.perf_counter()
      tokens = jax.block_until_ready(compiled(state, texts))
      seconds += time.perf_counter() - began
      keep = multihost_utils.process_allgather(real, tiled=True)
      whole = multihost_utils.process_allgather(tokens, tiled=True)
      written += list(np.asarray(whole)[np.asarray(keep).astype(bool)])
    pairs = [self._examples()[i] for i in self._places()]
    guesses = [self._text(ids) for ids in written]
    references = [_decoded(pair.target) for pair in pairs]
    metric = BLEU()
    score = metric.corpus_score(guesses, [references])
    sources = [_decoded(pair.source) for pair in pairs]
    samples = zip(sources, references, guesses, strict=True)
    return {
      'bleu': score.score,
      'bleu_signature': str(metric.get_signature()),
      'seconds_per_translation': seconds / len(written),
      'samples': [list(sample) for sample in samples][:_SAMPLES],
    }

  def baselines(self) -> dict[str, float]:
    """BLEU of the source itself."""
    from sacrebleu.metrics import BLEU

    pairs = [self._examples()[i] for i in self._places()]
    sources, targets = (
      [_decoded(text) for text in texts] for texts in zip(*pairs, strict=True)
    )
    return {'copied source': BLEU().corpus_score(sources, [targets]).score}

  def _translator(self, program) -> Callable:
    """The jitted (state, texts) -> tokens [B, T]."""
    config = self._config.eval
    length = self._length()

    def translate(state, texts):
      model = program.merge(state.params, state.model_state)
      context = AttentionContext(step=state.step, train=False)
      source, width = texts['source'], config.beam
      rows = source.shape[0]
      decoding = model.start(
        source,
        texts['source_ids'],
        hypotheses=width,
        length=length,
        context=context,
      )

      def reorder(decoding: Decoding, parents):
        flat = (jnp.arange(rows)[:, None] * width + parents).reshape(-1)
        shifted = jax.tree.map(lambda x: x[:, flat], decoding.caches)
        return decoding._replace(caches=shifted)

      return beam.search(
        lambda decoding, tokens, place: model.advance(
          decoding, tokens, place, context=context
        ),
        reorder,
        decoding,
        rows=rows,
        beam=width,
        length=length,
        begin=SEPARATOR,
        end=SEPARATOR,
        penalty=config.length_penalty,
      ).tokens

    whole = sharding.batch_sharding(self._mesh)
    return jax.jit(translate, out_shardings=whole)

  def _text(self, ids) -> str:
    ids = ids[: int(np.argmax(ids == SEPARATOR))] if SEPARATOR in ids else ids
    return _decoded(self._tokenizer.decode([int(i) for i in ids]))

  def _length(self) -> int:
    return self._config.eval.seq_len or self._config.train.seq_len[-1]

  def _examples(self):
    return self._data.examples.split(self._config.eval.split)

  def _count(self) -> int:
    return min(self._config.eval.windows, len(self._examples()))

  def _places(self) -> list[int]:
    """The judged pairs, in the order of the batches of all processes."""
    return pipeline.spread(self._count(), len(self._examples())).tolist()

  def _batches(self):
    source = self._rows(self._config.eval.split, self._length())
    return eval_batches(self._config, source, self._mesh)

  def _rows(self, split: str, length: int) -> PairRows:
    examples = self._data.examples.split(split)
    return PairRows(examples, self._tokenizer, length)


def _decoded(text: bytes) -> str:
  return text.decode('utf8', 'replace').strip()


register(
  TaskSpec(
    'translation',
    Translation,
    models=('encoder_decoder',),
    reads=sources.PAIRS,
    metrics={'bleu': Metric('BLEU', '.1f')},
    keys=('train.label_smoothing', 'eval.split'),
  )
)
