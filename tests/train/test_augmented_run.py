"""Augmentation, mixing, and pictures of TFDS through the training loop."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from psa_jax.train.losses import label_loss
from psa_jax.train.tasks import mixing

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
from psa_jax.config.recipe import load_recipe
from psa_jax.data import augment, images, tfds_images
from psa_jax.train import loop

EVERYTHING = AugmentConfig(
  crop='resized', flip=True, ops=2, magnitude=9.0, mixup=0.8, cutmix=1.0
)


def config(folder, name='tfds:cifar10', size=8, **changes):
  return Config(
    name='augmented',
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
  found = images.load(data)
  assert isinstance(found, tfds_images.PreparedImages)
  train = found.examples.train
  pixels = np.concatenate(
    [train[i].pixels.reshape(-1, 3) for i in range(len(train))]
  )
  np.testing.assert_allclose(found.moments[0], pixels.mean(0))
  np.testing.assert_allclose(found.moments[1], pixels.std(0))


def test_text_has_no_augmentation():
  with pytest.raises(ConfigError, match='data.augment is .*only .*kind=vit'):
    load_recipe('configs/lm_64k.py', [('data.augment.ops', '2')])


def picture(size=12, seed=0):
  rng = np.random.default_rng(seed)
  smooth = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
  return Image.fromarray(smooth).resize((size, size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize('number', range(len(augment.OPERATIONS)))
@pytest.mark.parametrize('channels', [1, 3])
def test_operations_grow_with_the_magnitude(number, channels):
  before = picture() if channels == 3 else picture().convert('L')
  operation = augment.OPERATIONS[number]

  def moved(amount, sign):
    after = operation(before, amount, sign)
    assert after.size == before.size and after.mode == before.mode
    change = np.asarray(after).astype(int) - np.asarray(before)
    return np.abs(change).mean()

  for sign in (1, -1):
    none, some, most = (moved(amount, sign) for amount in (0.0, 0.4, 1.0))
    if number in (1, 2):  # autocontrast and equalize have no magnitude
      assert none == some == most
    elif number == 0 or (number == 6 and channels == 1):  # colour of grey
      assert most == 0
    else:
      assert none < 0.6 and none <= some <= most > 1


def test_augmentation_is_its_random_numbers():
  change = augment.Augment(EVERYTHING, 8)
  row = {'images': np.asarray(picture()), 'labels': np.int32(1)}
  first, again, other = (
    change(row, np.random.default_rng(seed)) for seed in (1, 1, 2)
  )
  assert first['images'].shape == (8, 8, 3) and first['labels'] == 1
  np.testing.assert_array_equal(first['images'], again['images'])
  assert (first['images'] != other['images']).any()


def test_crops():
  rng = np.random.default_rng(0)
  flat = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
  seen = {np.asarray(augment.padded_crop(flat, rng)).mean() for _ in range(20)}
  assert max(seen) <= 200 and len(seen) > 5
  for _ in range(20):
    crop = np.asarray(augment.resized_crop(flat, rng, size=8))
    assert crop.shape == (8, 8, 3) and (crop == 200).all()
  wide = np.zeros((16, 32, 3), np.uint8)
  wide[:, 9:23] = 255  # the middle 14 of 16 columns and rows
  whole = np.asarray(augment.centre(Image.fromarray(wide), size=14))
  assert (whole == 255).all()


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixing_is_that_of_the_papers(kind):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 10, 10, 2)).astype(np.float32)
  alphas = {'mixup': 0.0, 'cutmix': 0.0, kind: 1.0}
  run = jax.jit(functools.partial(mixing.mix, **alphas))
  shares = []
  for seed in range(12):
    images_, own = run(jnp.asarray(x), jax.random.key(seed))
    got, own = np.asarray(images_), float(own)
    if kind == 'mixup':
      np.testing.assert_allclose(got, own * x + (1 - own) * x[::-1], atol=1e-6)
    else:
      theirs = (got == x[::-1]).all(-1)
      assert ((got == x).all(-1) | theirs).all()
      # The same box in every row, and its area is the partner's share.
      assert (theirs == theirs[:1]).all()
      assert theirs[0].mean() == pytest.approx(1 - own, abs=1e-6)
      rows, columns = theirs[0].any(1), theirs[0].any(0)
      np.testing.assert_array_equal(theirs[0], rows[:, None] & columns[None])
    shares.append(own)
  assert 0 <= min(shares) < 0.4 and 0.6 < max(shares) <= 1


def test_both_ways_take_turns():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 10, 1)))
  run = jax.jit(functools.partial(mixing.mix, mixup=1.0, cutmix=1.0))
  kinds = [
    bool(
      ((m := run(x, jax.random.key(s)).images) == x).any()
      | (m == x[::-1]).any()
    )
    for s in range(20)
  ]
  assert 4 < sum(kinds) < 16


def test_the_loss_of_a_mixed_label_is_that_of_its_distribution():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
  labels = np.array([0, 2, 1, 1, 0])
  own, smoothing, ones = 0.3, 0.1, jnp.ones(5)
  target = own * np.eye(3)[labels] + (1 - own) * np.eye(3)[labels[::-1]]
  target = (1 - smoothing) * target + smoothing / 3
  want = -(target * np.asarray(jax.nn.log_softmax(logits))).sum()
  found = [
    label_loss(logits, jnp.asarray(x), ones, smoothing=smoothing)[0]
    for x in (labels, mixing.partner(jnp.asarray(labels)))
  ]
  assert own * found[0] + (1 - own) * found[1] == pytest.approx(want, rel=1e-5)
