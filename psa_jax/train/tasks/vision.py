"""Image classification: one label a picture."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from psa_jax.config import Config, ConfigError
from psa_jax.data import images, pipeline
from psa_jax.eval import classification
from psa_jax.train.losses import label_loss
from psa_jax.train.stages import DataIterator, Stage
from psa_jax.train.tasks.base import Loss, auxiliary, eval_batches


class ImageClassification:
  """Labels of pictures of one size."""

  quality = 'accuracy'
  classes = 0

  def __init__(self, config: Config, data: images.ImageSet, mesh: Mesh):
    """Looks at the pictures.

    Args:
      config: the run.
      data: from `images.load`.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: pictures of another size than the model's, a number of
        tokens that is not the model's, or a split that is not there.
    """
    image = config.model.image
    found, asked = data.train.pixels.shape[1:], (image.size,) * 2
    if found != (*asked, image.channels):
      raise ConfigError(
        f'the pictures of {config.data.source} are {found[0]} x {found[1]} '
        f'with {found[2]} channels; set model.image.size and channels '
        f'to that, not {image.size} and {image.channels}'
      )
    tokens = (image.size // image.patch) ** 2
    lengths = {*config.train.seq_len, config.eval.seq_len or tokens}
    if lengths != {tokens}:
      raise ConfigError(
        f'pictures of {image.size} in patches of {image.patch} are {tokens} '
        f'tokens; set train.seq_len to that, not {config.train.seq_len}, and '
        'eval.seq_len to 0'
      )
    self.vocab_size = len(data.classes)
    self._config, self._data, self._mesh = config, data, mesh

  def loss(
    self, model, batch, *, step, train, mechanism=None, budget=None
  ) -> Loss:
    """Nats of the labels, smoothed in training; `hits` are right answers."""
    pixels, labels = batch['images'], batch['labels']
    weights = batch['weights'][:, 0]
    if train and self._config.data.shift:
      key = jax.random.fold_in(jax.random.key(self._config.seed), step)
      pixels = shift(pixels, key, most=self._config.data.shift)
    out = model(
      self._data.normalize(pixels),
      step=step,
      train=train,
      mechanism=mechanism,
      budget=budget,
    )
    logits = model.classify(out.hidden)
    smoothing = self._config.train.label_smoothing if train else 0.0
    total, hits = label_loss(logits, labels, weights, smoothing=smoothing)
    weight = jnp.sum(weights)
    return Loss(
      total, weight, {'hits': hits}, out.aux, auxiliary(out.aux, weight)
    )

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats a picture, and `accuracy`."""
    return classification.metrics(loss.total, loss.sums['hits'], loss.weight)

  def train_iterator(self, stage: Stage) -> DataIterator:
    """Shuffled pictures, this process's rows."""
    return pipeline.train_iterator(
      images.Rows(self._data.train),
      batch_size=stage.batch_size,
      seed=stage.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Accuracy and loss on `eval.windows` pictures of `eval.split`."""
    source = images.Rows(getattr(self._data, self._config.eval.split))
    found = classification.evaluate(
      eval_step,
      state,
      eval_batches(self._config, source, self._mesh),
      mesh=self._mesh,
      before_batch=before_batch,
    )
    return {**found, 'windows': min(self._config.eval.windows, len(source))}

  def baselines(self) -> dict[str, float]:
    """Accuracy of the most frequent training label on the judged split."""
    return {'majority': self._data.majority(self._config.eval.split)}


def shift(
  pixels: UInt8[Array, 'B S S C'], key: jax.Array, *, most: int
) -> UInt8[Array, 'B S S C']:
  """Moves every picture by up to `most` pixels each way, over black."""
  B, size = pixels.shape[:2]
  around = (most, most)
  wide = jnp.pad(pixels, ((0, 0), around, around, (0, 0)))
  at = jax.random.randint(key, (B, 2), 0, 2 * most + 1)

  def cut(picture, corner):
    start = (corner[0], corner[1], 0)
    return jax.lax.dynamic_slice(
      picture, start, (size, size, picture.shape[-1])
    )

  return jax.vmap(cut)(wide, at)
