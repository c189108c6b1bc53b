"""The tasks: one class each, of the shape in `base.py`."""

from jax.sharding import Mesh

from psa_jax.config import TAGGED, Config
from psa_jax.data import (
  images,
  labelled,
  lm,
  parallel,
  synthetic,
  tagged,
  tfds_images,
)
from psa_jax.train.tasks.base import Generator as Generator
from psa_jax.train.tasks.base import Loss as Loss
from psa_jax.train.tasks.base import Task as Task
from psa_jax.train.tasks.base import auxiliary as auxiliary
from psa_jax.train.tasks.labels import TextClassification as TextClassification
from psa_jax.train.tasks.labels import TokenLabelling as TokenLabelling
from psa_jax.train.tasks.language import LanguageModel as LanguageModel
from psa_jax.train.tasks.recall import Recall as Recall
from psa_jax.train.tasks.translation import Translation as Translation
from psa_jax.train.tasks.vision import (
  ImageClassification as ImageClassification,
)

# What a run's data may be; each has a `manifest`.
Data = (
  lm.Corpus
  | synthetic.Recall
  | images.ImageSet
  | tfds_images.PreparedImages
  | labelled.LabelledSet
  | tagged.TaggedSet
  | parallel.ParallelSet
)


def load_data(config: Config) -> Data:
  """What the run's task is made of; its `manifest` identifies it.

  Raises:
    ConfigError: data that is missing or does not fit the run.
    RunError: the data cache cannot be written.
  """
  if config.model.kind == 'vit':
    return images.load(config.data)
  if config.model.kind == 'encoder':
    tags = config.data.source in TAGGED or config.data.words_key
    return tagged.load(config.data) if tags else labelled.load(config.data)
  if config.model.kind == 'encoder_decoder':
    return parallel.load(config.data)
  if config.data.source.startswith('synthetic:'):
    return synthetic.build(config)
  return lm.build_corpus(config.data)


def make_task(config: Config, data: Data, mesh: Mesh) -> Task:
  """The task on data from `load_data`; raises as its class does."""
  if isinstance(data, images.ImageSet | tfds_images.PreparedImages):
    return ImageClassification(config, data, mesh)
  if isinstance(data, labelled.LabelledSet):
    return TextClassification(config, data, mesh)
  if isinstance(data, tagged.TaggedSet):
    return TokenLabelling(config, data, mesh)
  if isinstance(data, parallel.ParallelSet):
    return Translation(config, data, mesh)
  if isinstance(data, synthetic.Recall):
    return Recall(config, data, mesh)
  return LanguageModel(config, data, mesh)
