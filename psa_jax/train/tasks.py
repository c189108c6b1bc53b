"""What the one training loop needs to know of a task.

A task turns a model and a batch into a `Loss`, supplies batches, and says how
it is evaluated: `LanguageModel` on text, `Recall` on questions made on the fly.
Image classification or translation joins by another class of this shape, not
by another loop.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from psa_jax import sharding
from psa_jax.config import Config, ConfigError
from psa_jax.data import lm, pipeline, synthetic
from psa_jax.data.tokenizer import byte_lengths
from psa_jax.eval import perplexity, recall
from psa_jax.train.losses import answer_loss, next_token_loss
from psa_jax.train.stages import DataIterator, Stage
from psa_jax.types import Scalar


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


def auxiliary(
  aux: Mapping[str, jax.Array], weight: Float[Array, '']
) -> Float[Array, '']:
  """Sum of a model's scalars named `loss/...`, each a mean, times `weight`.

  Divided by the weight of the whole batch it is their mean again, weighted as
  the loss is, however the batch was cut into micro-batches.
  """
  losses = [value for name, value in aux.items() if name.startswith('loss/')]
  return weight * sum(losses, jnp.float32(0))


@runtime_checkable
class Task(Protocol):
  """A training task. Batches are dicts of numpy arrays, rows first.

  Attributes:
    vocab_size: size of the model's output.
    quality: name of the metric that a run is judged by.
  """

  vocab_size: int
  quality: str

  def loss(
    self,
    model: nnx.Module,
    batch: Mapping[str, jax.Array],
    *,
    step: Scalar,
    train: bool,
    mechanism: str | None = None,
    budget: Scalar | None = None,
  ) -> Loss:
    """The loss of one batch; pure apart from the module's statistics."""
    ...

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """What is logged of a loss, `loss` among it; traced or float64."""
    ...

  def train_iterator(self, stage: Stage) -> DataIterator:
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


def load_data(config: Config) -> lm.Corpus | synthetic.Recall:
  """What the run's task is made of; its `manifest` identifies it.

  Raises:
    ConfigError: data that is missing or does not fit the run.
    RunError: the data cache cannot be written.
  """
  if config.data.source.startswith('synthetic:'):
    return synthetic.build(config)
  return lm.build_corpus(config.data)


def make_task(
  config: Config, data: lm.Corpus | synthetic.Recall, mesh: Mesh
) -> Task:
  """The task on data from `load_data`; raises as its class does."""
  if isinstance(data, synthetic.Recall):
    return Recall(config, data, mesh)
  return LanguageModel(config, data, mesh)


class LanguageModel:
  """Next-token prediction on packed windows of text."""

  quality = 'bits_per_byte'

  def __init__(self, config: Config, corpus: lm.Corpus, mesh: Mesh):
    """Looks at the corpus.

    Args:
      config: the run.
      corpus: from `lm.build_corpus`.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a model that sees what it is to predict, a vocabulary
        smaller than the tokenizer's, or a window longer than the text.
    """
    if config.model.kind != 'decoder_lm':
      raise ConfigError(
        f'model.kind={config.model.kind} sees the next token, so it cannot '
        'learn to predict it; set model.kind=decoder_lm'
      )
    tokenizer = corpus.tokenizer
    self.vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if self.vocab_size < tokenizer.vocab_size:
      raise ConfigError(
        f'model.vocab_size={self.vocab_size} is below the '
        f'{tokenizer.vocab_size} of the tokenizer; set it to 0 to take those'
      )
    self._config, self._corpus, self._mesh = config, corpus, mesh
    for seq_len in config.train.seq_len:
      self._windows(corpus.train, seq_len)
    lengths = byte_lengths(corpus.tokenizer)
    spare = self.vocab_size - len(lengths)
    self._byte_lengths = np.pad(lengths, (0, spare)).astype(np.float32)

  def loss(
    self, model, batch, *, step, train, mechanism=None, budget=None
  ) -> Loss:
    """Nats of the next tokens; `bytes` are those the targets stand for."""
    cut = self._config.data.cut_documents
    weights = batch['weights']
    out = model(
      batch['inputs'],
      step=step,
      positions=batch['positions'],
      segment_ids=batch['segment_ids'] if cut else None,
      mask=weights,
      train=train,
      mechanism=mechanism,
      budget=budget,
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

  def train_iterator(self, stage: Stage) -> DataIterator:
    """Shuffled windows of the stage's length, this process's rows."""
    return pipeline.train_iterator(
      self._windows(self._corpus.train, stage.seq_len),
      batch_size=stage.batch_size,
      seed=stage.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Bits per byte and loss (see `perplexity`) of `eval.windows` windows."""
    config = self._config
    seq_len = config.eval.seq_len or config.train.seq_len[-1]
    source = self._windows(self._corpus.validation, seq_len)
    batches = _eval_batches(config, source, self._mesh)
    found = perplexity.evaluate_lm(
      eval_step, state, batches, mesh=self._mesh, before_batch=before_batch
    )
    return {**found, 'windows': min(config.eval.windows, len(source))}

  def baselines(self) -> dict[str, float]:
    """Bits per byte of the unigram and the bigram of the training text."""
    return {
      'unigram': self._corpus.unigram_bpb,
      'bigram': self._corpus.bigram_bpb,
    }

  def _windows(self, packed: lm.Packed, seq_len: int) -> lm.Windows:
    cut = self._config.data.cut_documents
    return lm.windows(packed, seq_len=seq_len, cut_documents=cut)


class Recall:
  """Questions about facts that lie far back; only the answers count."""

  quality = 'accuracy'

  def __init__(self, config: Config, data: synthetic.Recall, mesh: Mesh):
    """Looks at the task.

    Args:
      config: the run.
      data: from `synthetic.build`.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: a model that sees the answers ahead, or a vocabulary smaller
        than the task's.
    """
    if config.model.kind != 'decoder_lm':
      raise ConfigError(
        f'model.kind={config.model.kind} sees the answers that it is to give; '
        'set model.kind=decoder_lm'
      )
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

  def loss(
    self, model, batch, *, step, train, mechanism=None, budget=None
  ) -> Loss:
    """Nats of the answers; `hits` are questions that are wholly right."""
    out = model(
      batch['inputs'],
      step=step,
      train=train,
      mechanism=mechanism,
      budget=budget,
    )
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

  def train_iterator(self, stage: Stage) -> DataIterator:
    """Rows of the stage's length, each seen once."""
    return pipeline.train_iterator(
      self._data.train(seq_len=stage.seq_len, seed=stage.seed),
      batch_size=stage.batch_size,
      seed=stage.seed,
      shuffle=False,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Accuracy (see `eval.recall`) on `eval.windows` rows."""
    config = self._config
    rows = self._data.validation(
      seq_len=config.eval.seq_len or config.train.seq_len[-1],
      rows=config.eval.windows,
    )
    found = recall.evaluate_recall(
      eval_step,
      state,
      _eval_batches(config, rows, self._mesh),
      mesh=self._mesh,
      by=self._buckets,
      before_batch=before_batch,
    )
    return {**found, 'windows': config.eval.windows}

  def baselines(self) -> dict[str, float]:
    """Accuracy of guessing."""
    return {'chance': self._data.chance()}


def _eval_batches(
  config: Config, source: pipeline.Source, mesh: Mesh
) -> pipeline.EvalBatches:
  """This process's share of `eval.windows` windows of `source`."""
  shards = sharding.batch_shards(mesh)
  rows = max(1, config.train.batch_size[-1] // config.optim.accumulate)
  return pipeline.eval_batches(
    source,
    batch_size=-(-min(rows, config.eval.windows) // shards) * shards,
    limit=config.eval.windows,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
