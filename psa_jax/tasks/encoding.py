"""What classification and tagging share: text read by an encoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Int

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config, ConfigError
from psa_jax.data import pipeline
from psa_jax.data.examples import rows
from psa_jax.data.text.tokenizer import SEPARATOR, Tokenizer, make_tokenizer
from psa_jax.eval import totals
from psa_jax.tasks.base import Stage, eval_batches, train_batches

# Keys of the configuration that tasks of an encoder have.
KEYS = ('data.word_dropout', 'train.label_smoothing', 'eval.split')
_SAMPLE = 1000  # texts whose lengths are looked at


class Encoding:
  """An encoder, a tokenizer, and rows of one length.

  Attributes:
    row_type: turns examples into rows.
    config, data, mesh: as given.
  """

  row_type: type

  def __init__(self, config: Config, data: Any, mesh: Mesh):
    """Trains the tokenizer.

    Args:
      config: the run.
      data: a set of texts with labels, or of words with tags.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a vocabulary smaller than the tokenizer's, or a split that
        is not there.
    """
    self.config, self.data, self.mesh = config, data, mesh
    splits = data.examples
    splits.split(config.eval.split)  # refuses one that is not there
    self._tokenizer = make_tokenizer(
      config.data, (self.text(example) for example in splits.train)
    )
    self.vocab_size = fitting_vocabulary(config, self._tokenizer)
    longest = max(*config.train.seq_len, config.eval.seq_len)
    sample = [splits.train[i] for i in range(min(_SAMPLE, len(splits.train)))]
    texts = map(self.text, sample)
    sizes = [len(ids) for ids in self._tokenizer.encode_all(texts)]
    cut = rows.share_cut(sizes, longest)
    if cut > 0.01:
      logging.warning(
        '%.0f %% of the texts have more than the %d tokens of a row and are '
        'cut; raise train.seq_len',
        100 * cut,
        longest,
      )

  def text(self, example: Any) -> bytes:
    """What the tokenizer learns from an example."""
    raise NotImplementedError

  def hidden(self, model, batch, context: AttentionContext):
    """The encoder's output on a batch, some tokens hidden in training."""
    tokens = batch['inputs']
    if context.train and self.config.data.word_dropout:
      key = jax.random.fold_in(jax.random.key(self.config.seed), context.step)
      tokens = word_dropout(tokens, key, share=self.config.data.word_dropout)
    return model(
      tokens,
      context=dataclasses.replace(context, segment_ids=batch['segment_ids']),
    )

  def train_iterator(self, stage: Stage) -> pipeline.DataIterator:
    """Shuffled examples, this process's rows."""
    return train_batches(self.config, self._rows('train', stage.seq_len), stage)

  def add_up(self, eval_step, state, before_batch):
    """What the judged rows add up to, and how many there are."""
    config = self.config
    length = config.eval.seq_len or config.train.seq_len[-1]
    source = self._rows(config.eval.split, length)
    tally = totals.add_up(
      eval_step,
      state,
      eval_batches(config, source, self.mesh),
      mesh=self.mesh,
      before_batch=before_batch,
      hint='there is nothing to judge in the split eval.split',
    )
    return tally, min(config.eval.windows, len(source))

  def _rows(self, split: str, length: int):
    examples = self.data.examples.split(split)
    return self.row_type(examples, self._tokenizer, length)


def word_dropout(
  tokens: Int[Array, 'B T'], key: jax.Array, *, share: float
) -> Int[Array, 'B T']:
  """A share of the tokens becomes `SEPARATOR`, each for itself.

  arXiv 1511.06349, section 3.1, at the input of an encoder.
  """
  hidden = jax.random.bernoulli(key, share, tokens.shape)
  return jnp.where(hidden, SEPARATOR, tokens)


def fitting_vocabulary(config: Config, tokenizer: Tokenizer) -> int:
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
