"""Pictures of TFDS, augmented and mixed, through the training loop."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from psa_jax.config import (
  AugmentConfig,
  CheckpointConfig,
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  ImageConfig,
  ModelConfig,
  NormConfig,
  OptimConfig,
  TrainConfig,
)
from psa_jax.data import sources
from psa_jax.data.images import sets
from psa_jax.train import loop

pytestmark = pytest.mark.tier('default')

EVERYTHING = AugmentConfig(
  crop='resized', flip=True, ops=2, magnitude=9.0, mixup=0.8, cutmix=1.0
)


def config(folder, name='tfds:cifar10', size=8, **changes):
  return Config(
    name='augmented',
    task='image_classification',
    data=DataConfig(
      source=name, data_dir=str(folder), augment=AugmentConfig(**changes)
    ),
    model=ModelConfig(
      kind='vit',
      num_layers=2,
      d_model=16,
      num_heads=2,
      num_kv_heads=2,
      mlp_dim=24,
      mlp='gelu',
      biases=True,
      drop_path=0.2,
      image=ImageConfig(size=size, channels=3, patch=4),
      norm=NormConfig('layernorm'),
    ),
    optim=OptimConfig(warmup_steps=1, decay_steps=4),
    train=TrainConfig(
      steps=(4,),
      seq_len=((size // 4) ** 2,),
      batch_size=(8,),
      label_smoothing=0.1,
    ),
    eval=EvalConfig(windows=8, dense=False),
    checkpoint=CheckpointConfig(every=0),
  )


class Mixed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Sixty pictures of three sizes; one has a label that is none."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.ClassLabel(names=['dark', 'light', 'none']),
        }
      ),  # fmt: skip
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._pictures(60), 'test': self._pictures(8)}

  def _pictures(self, count):
    rng = np.random.default_rng(0)
    for i in range(count):
      shape = (8 + 4 * (i % 3), 8 + 2 * (i % 2), 3)
      pixels = rng.integers(0, 120, shape) + 130 * (i % 2)
      label = -1 if count == 8 and i == 5 else i % 2
      content = io.BytesIO()
      Image.fromarray(pixels.astype(np.uint8)).save(content, 'PNG')
      content.seek(0)
      yield i, {'image': content, 'label': label}

  _generate_examples = _pictures


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  tfds.disable_progress_bar()
  root = tmp_path_factory.mktemp('tfds')
  Mixed(data_dir=root, file_format='array_record').download_and_prepare()
  return root


def settings(cfg, **changes):
  return dataclasses.replace(cfg, **changes)


def test_a_run_with_everything_on_goes_on_bit_for_bit(prepared, tmp_path):
  cfg = config(prepared, 'tfds:mixed', **dataclasses.asdict(EVERYTHING))
  whole = loop.train_and_evaluate(cfg, tmp_path / 'whole')
  assert whole['baselines'] == {'chance': 1 / 3}
  # In parts with threads, which have read ahead of where the first half stops.
  threaded = settings(cfg, data=settings(cfg.data, threads=3))
  half = settings(threaded, train=settings(cfg.train, steps=(2,)))
  loop.train_and_evaluate(half, tmp_path / 'parts')
  parts = loop.train_and_evaluate(threaded, tmp_path / 'parts')
  a, b = (x['validation']['dense']['loss'] for x in (whole, parts))
  assert np.isfinite(a) and a == b


def test_cifar10_from_mock_data(tmp_path):
  with tfds.testing.mock_data(num_examples=40):
    changes = dict(crop='pad', flip=True, ops=1, mixup=0.8)
    cfg = config(tmp_path / 'd', size=32, **changes)
    found = loop.train_and_evaluate(cfg, tmp_path / 'run')
  assert found['baselines'] == {'chance': 0.1}
  assert found['validation']['dense']['windows'] == 8


def test_pictures_of_mixed_sizes_are_named(prepared, tmp_path):
  cfg = config(prepared, 'tfds:mixed')
  words = 'train: picture 1 is 12 x 10 and model.image.size is 8.*crop=resized'
  with pytest.raises(ConfigError, match=words):
    loop.train_and_evaluate(cfg, tmp_path)


def test_an_unknown_class_in_evaluation_is_named(prepared, tmp_path):
  cfg = config(prepared, 'tfds:mixed', crop='resized')
  cfg = settings(cfg, eval=settings(cfg.eval, split='test'))
  with pytest.raises(ConfigError, match='test: record 5 has label -1'):
    loop.train_and_evaluate(cfg, tmp_path)


def test_channels_that_do_not_fit_are_named(prepared, tmp_path):
  cfg = config(prepared, 'tfds:mixed', crop='resized')
  image = settings(cfg.model.image, channels=1)
  cfg = settings(cfg, model=settings(cfg.model, image=image))
  with pytest.raises(ConfigError, match='has 3 channels; set model.image.chan'):
    loop.train_and_evaluate(cfg, tmp_path)


def test_moments_are_those_of_the_pixels(prepared):
  data = DataConfig(source='tfds:mixed', data_dir=str(prepared))
  found = sources.load(data, sources.IMAGES)
  assert isinstance(found, sets.PreparedImages)
  train = found.examples.train
  pixels = np.concatenate(
    [train[i].pixels.reshape(-1, 3) for i in range(len(train))]
  )
  np.testing.assert_allclose(found.moments[0], pixels.mean(0))
  np.testing.assert_allclose(found.moments[1], pixels.std(0))
