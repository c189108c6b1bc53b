"""Image classification: one label a picture."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from psa_jax.attention.context import AttentionContext
from psa_jax.config import Config, ConfigError
from psa_jax.data import pipeline, sources
from psa_jax.data.images import augment, mixing, sets
from psa_jax.eval import classification
from psa_jax.tasks.base import (
  ACCURACY,
  Loss,
  Stage,
  auxiliary,
  eval_batches,
  train_batches,
)
from psa_jax.tasks.losses import counted, label_loss
from psa_jax.tasks.registry import TaskSpec, register


class ImageClassification:
  """Labels of pictures of one size."""

  quality = 'accuracy'
  classes = 0

  def __init__(
    self,
    config: Config,
    data: sets.ImageSet | sets.PreparedImages,
    mesh: Mesh,
  ):
    """Looks at the pictures.

    Args:
      config: the run.
      data: pictures and their labels.
      mesh: devices that share the rows of a batch.

    Raises:
      ConfigError: pictures of another size than the model's, a number of
        tokens that is not the model's, or a split that is not there.
    """
    image = config.model.image
    self._shape = (image.size, image.size, image.channels)
    self._config, self._data, self._mesh = config, data, mesh
    for split in ('train', config.eval.split):
      self._rows(split)[0]  # refuses a wrong shape before anything is built
    tokens = (image.size // image.patch) ** 2
    lengths = {*config.train.seq_len, config.eval.seq_len or tokens}
    if lengths != {tokens}:
      raise ConfigError(
        f'pictures of {image.size} in patches of {image.patch} are {tokens} '
        f'tokens; set train.seq_len to that, not {config.train.seq_len}, and '
        'eval.seq_len to 0'
      )
    self.vocab_size = len(data.classes)

  def loss(self, model, batch, context: AttentionContext) -> Loss:
    """Nats of the labels, smoothed and mixed in training.

    `hits` are right answers; of a mixed picture, what most of it is.
    """
    pixels, labels = batch['images'], batch['labels']
    weights, data = batch['weights'][:, 0], self._config.data
    key = jax.random.fold_in(jax.random.key(self._config.seed), context.step)
    if context.train and data.shift:
      pixels = shift(pixels, key, most=data.shift)
    images, share = self._data.normalize(pixels), None
    if context.train and (data.augment.mixup or data.augment.cutmix):
      images, share = mixing.mix(
        images,
        jax.random.fold_in(key, 1),
        mixup=data.augment.mixup,
        cutmix=data.augment.cutmix,
      )
    out = model(images, context=context)
    hidden = counted(out.hidden, weights[:, None])
    logits = model.classify(hidden)
    smoothing = self._config.train.label_smoothing if context.train else 0.0
    judge = functools.partial(
      label_loss, logits, weights=weights, smoothing=smoothing
    )
    total, hits = judge(labels)
    if share is not None:
      # The loss is linear in the label, so that of a mixed one is a mixture.
      others, other_hits = judge(mixing.partner(labels))
      total = share * total + (1 - share) * others
      hits = jnp.where(share >= 0.5, hits, other_hits)
    weight = jnp.sum(weights)
    return Loss(
      total, weight, {'hits': hits}, out.aux, auxiliary(out.aux, weight)
    )

  def metrics(self, loss: Loss) -> dict[str, Any]:
    """`loss` in nats a picture, and `accuracy`."""
    return classification.metrics(loss.total, loss.sums['hits'], loss.weight)

  def train_iterator(self, stage: Stage) -> pipeline.DataIterator:
    """Shuffled pictures, augmented, this process's rows."""
    config = self._config.data.augment
    change = augment.Augment(config, self._shape[0])
    return train_batches(
      self._config,
      self._rows('train', train=True),
      stage,
      augment=change if config.on_host else None,
    )

  def evaluate(self, eval_step, state, *, before_batch):
    """Accuracy and loss on `eval.windows` pictures of `eval.split`."""
    source = self._rows(self._config.eval.split)
    scores = classification.evaluate(
      eval_step,
      state,
      eval_batches(self._config, source, self._mesh),
      mesh=self._mesh,
      before_batch=before_batch,
    )
    return {**scores, 'windows': min(self._config.eval.windows, len(source))}

  def baselines(self) -> dict[str, float]:
    """Accuracy of a constant answer on the judged split."""
    return self._data.baselines(self._config.eval.split)

  def _rows(self, split: str, *, train: bool = False):
    crop = self._config.data.augment.crop
    return self._data.rows(split, self._shape, crop=crop, train=train)


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


def check(config: Config) -> Iterator[str]:
  """One line for each setting that does not fit the pictures."""
  image, most = config.model.image, config.data.shift
  if image.size % image.patch:
    yield (
      f'config.model.image.patch is {image.patch}, but it must divide '
      f'config.model.image.size, which is {image.size}'
    )
  if most >= image.size:
    yield (
      f'config.data.shift is {most}, but it must be below '
      f'config.model.image.size, which is {image.size}'
    )


register(
  TaskSpec(
    'image_classification',
    ImageClassification,
    models=('vit',),
    reads=sources.IMAGES,
    metrics={'accuracy': ACCURACY},
    keys=('data.shift', 'data.augment', 'train.label_smoothing', 'eval.split'),
    check=check,
  )
)
