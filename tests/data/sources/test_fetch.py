"""Sets from an index and by apt, with pip and apt mocked."""

import subprocess

import pytest

from psa_jax.config import DataConfig, RunError
from psa_jax.data import prepare, sources
from psa_jax.data.sources import fetch, vader
from tests.data.sources.test_vader import write_archive


def stanzas(language, count=60):
  return '\n'.join(
    f'Package: p{i}\nDescription-md5: {i}\n'
    f'Description-{language}: {language} {i}\n text {language} {i}\n'
    for i in range(count)
  ).encode()


@pytest.fixture
def index(tmp_path):
  """A package index in a folder."""
  return tmp_path / 'simple'


@pytest.fixture
def commands(monkeypatch, index):
  """What was run; pip and apt answer and write what they would."""
  ran = []

  def run(command, **settings):
    assert settings == {'capture_output': True, 'check': True}
    command = [str(word) for word in command]
    ran.append(command)
    out = b''
    if 'pip' in command:
      assert command[-2:] == ['config', 'list']  # it downloads nothing
      out = f"global.index-url='{index.as_uri()}'\n".encode()
    elif 'update' in command:
      lists = next(w for w in command if w.startswith('Dir::State::lists='))
      folder = lists.partition('=')[2]
      for language in ('en', 'fr'):
        with open(f'{folder}/x_Translation-{language}.lz4', 'wb') as f:
          f.write(stanzas(language))
    elif 'cat-file' in command:
      for path in command[2:]:
        with open(path, 'rb') as f:
          out += f.read()
    return subprocess.CompletedProcess(command, 0, out, b'')

  monkeypatch.setattr(fetch.subprocess, 'run', run)
  return ran


def test_descriptions_are_fetched_once(tmp_path, commands, capsys):
  arguments = ['--name=ddtp_en_fr', f'--data_dir={tmp_path}']
  assert prepare.main(arguments) == 0
  assert 'use: --config.data.source=ddtp_en_fr' in capsys.readouterr().out
  assert [c[0].rpartition('/')[2] for c in commands] == [
    'apt-get', 'apt-helper', 'apt-helper'
  ]  # fmt: skip
  assert 'Acquire::Languages=en,fr' in commands[0]
  assert prepare.main(arguments) == 0 and len(commands) == 3
  config = DataConfig(source='ddtp_en_fr', data_dir=str(tmp_path))
  examples = sources.load(config, sources.PAIRS).examples
  assert (
    sum(len(examples.split(s)) for s in ('train', 'test', 'validation')) == 120
  )
  assert b'en' in examples.train[0].source and b'fr' in examples.train[0].target


def test_a_language_without_descriptions(tmp_path, commands, capsys):
  arguments = ['--name=ddtp_en_xx', f'--data_dir={tmp_path}']
  assert prepare.main(arguments) == 1
  assert "no descriptions in 'xx'; choose another" in capsys.readouterr().err
  assert commands and not (tmp_path / 'ddtp_en_xx').exists()


def test_sentences_are_fetched_by_their_hash(
  tmp_path, commands, index, monkeypatch, capsys
):
  """Nothing of the archive is run, and another one is not kept."""
  page = index / 'vadersentiment' / 'index.html'
  digest = write_archive(page.with_name('vaderSentiment-3.3.2.tar.gz'))
  page.write_text('<a href="vaderSentiment-3.3.2.tar.gz#sha256=0">it</a>')
  arguments = ['--name=vader3', f'--data_dir={tmp_path}']
  assert prepare.main(arguments) == 1
  error = capsys.readouterr().err
  assert f'has sha256 {digest} and not {vader.SHA256}' in error
  assert error.count('\n') == 1 and not (tmp_path / 'vader3').exists()
  monkeypatch.setattr(vader, 'SHA256', digest)
  assert prepare.main(arguments) == 0
  assert 'vader3: train ' in capsys.readouterr().out
  assert [p.name for p in (tmp_path / 'vader3').iterdir()] == [vader.FILE]
  assert all('download' not in command for command in commands)


def test_failures_are_one_line(tmp_path, monkeypatch):
  def missing(command, **settings):
    raise FileNotFoundError(command[0])

  monkeypatch.setattr(fetch.subprocess, 'run', missing)
  with pytest.raises(RunError, match='needs apt-get, which is not on this'):
    prepare.prepare('ddtp_en_de', str(tmp_path))

  def failing(command, **settings):
    raise subprocess.CalledProcessError(1, command, b'', b'no\nnetwork')

  monkeypatch.setattr(fetch.subprocess, 'run', failing)
  with pytest.raises(RunError, match='vader3 could not be fetched: no network'):
    prepare.prepare('vader3', str(tmp_path))
  assert not list(tmp_path.glob('*vader*'))
