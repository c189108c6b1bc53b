"""Language modelling on packed windows of text."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config
from psa_jax.data import pipeline, sources
from psa_jax.data.text.corpus import Corpus, build_corpus
from psa_jax.data.text.tokenizer import byte_lengths
from psa_jax.data.text.windows import Packed, Windows, windows
from psa_jax.eval import perplexity
from psa_jax.tasks.base import (
  Loss,
  Metric,
  Stage,
  auxiliary,
  eval_batches,
  train_batches,
)
from psa_jax.tasks.encoding import fitting_vocabulary
from psa_jax.tasks.losses import next_token_loss
from psa_jax.tasks.registry import TaskSpec, register


class LanguageModel:
  """Next-token prediction on packed windows of text."""

  quality = 'bits_per_byte'
  classes = 0

  def __init__(self, config: Config, corpus: Corpus, mesh: Mesh):
    """Looks at the corpus.

    Args:
      config: the run.
      corpus: from `build_corpus`.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a vocabulary smaller than the tokenizer's, or a window
        longer than the text.
    """
    self.vocab_size = fitting_vocabulary(config, corpus.tokenizer)
    self._config, self._corpus, self._mesh = config, corpus, mesh
    for seq_len in config.train.seq_len:
      self._windows(corpus.train, seq_len)
    lengths = byte_lengths(corpus.tokenizer)
    spare = self.vocab_size - len(lengths)
    self._byte_lengths = np.pad(lengths, (0, spare)).astype(np.float32)

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the next tokens; `bytes` are those the targets stand for."""
    cut = self._config.data.cut_documents
    weights = batch['weights']
    out = model(
      batch['inputs'],
      context=dataclasses.replace(
        context,
        segment_ids=batch['segment_ids'] if cut else None,
        mask=weights,
      ),
      positions=batch['positions'],
    )
    total, weight = next_token_loss(
      model,
      out.hidden,
      batch['targets'],
      weights,
      chunk=self._config.train.loss_chunk,
    )
    size = jnp.asarray(self._byte_lengths)[batch['targets']]
    sums = {'bytes': jnp.sum(weights * size)}
    return Loss(total, weight, sums, out.aux, auxiliary(out.aux, weight))

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats per token and `bits_per_byte`."""
    return perplexity.language_metrics(
      loss.total, loss.weight, loss.sums['bytes']
    )

  def train_iterator(self, stage: Stage) -> pipeline.DataIterator:
    """Shuffled windows of the stage's length, this process's rows."""
    return train_batches(
      self._config, self._windows(self._corpus.train, stage.seq_len), stage
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Bits per byte and loss (see `perplexity`) of `eval.windows` windows."""
    config = self._config
    seq_len = config.eval.seq_len or config.train.seq_len[-1]
    source = self._windows(self._corpus.validation, seq_len)
    batches = eval_batches(config, source, self._mesh)
    scores = perplexity.evaluate_lm(
      eval_step, state, batches, mesh=self._mesh, before_batch=before_batch
    )
    return {**scores, 'windows': min(config.eval.windows, len(source))}

  def baselines(self) -> dict[str, float]:
    """Bits per byte of the unigram and the bigram of the training text."""
    return {
      'unigram': self._corpus.unigram_bpb,
      'bigram': self._corpus.bigram_bpb,
    }

  def _windows(self, packed: Packed, seq_len: int) -> Windows:
    cut = self._config.data.cut_documents
    return windows(packed, seq_len=seq_len, cut_documents=cut)


register(
  TaskSpec(
    'language_modeling',
    LanguageModel,
    models=('decoder_lm',),
    reads=sources.DOCUMENTS,
    metrics={
      'bits_per_byte': Metric('bits per byte', '.4f', 'bits/byte', '.3f')
    },
    load=lambda config: build_corpus(config.data),
  )
)
