"""What `make audit` lists, and when it fails."""

import importlib.util
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def audit():
  path = ROOT / '.ci' / 'audit.py'
  spec = importlib.util.spec_from_file_location('audit', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_all_that_is_fetched_is_locked(audit, capsys):
  assert audit.main() == 0
  out = capsys.readouterr().out
  assert 'without an exact version: none\n' in out
  assert 'fetched at run time, without a lock: none\n' in out
  for name in ('vader3: sha256 5d7c06e0', 'ddtp_en_<language>: the signature'):
    assert f'\n  {name}' in out
  assert 'jax==' in out and 'protobuf==' in out and 'promise' in out


def test_what_is_not_locked_fails(audit, monkeypatch, capsys):
  monkeypatch.setattr(audit, 'fetched', lambda: {'a set': ''})
  assert audit.main() == 1
  assert 'a set: NOT LOCKED' in capsys.readouterr().out
  monkeypatch.setattr(audit, 'fetched', dict)
  monkeypatch.setattr(audit, 'requirements', lambda _: [('file', 'jax>=1')])
  assert audit.main() == 1
  assert 'exact version: 1\n  jax>=1 (file)' in capsys.readouterr().out


def test_requirements_are_those_of_all_files(audit, tmp_path):
  (tmp_path / 'requirements.txt').write_text('# a\n-r b.txt\n\njax==1\nnumpy\n')
  (tmp_path / 'Makefile').write_text(
    'SDISTS = x,y\nPIP = p -m pip install -q --a=b \\\n  -r file\n'
    'peers:\n\t.venv/bin/python -m pip install -q \\\n\t  torch==2 numpy\n'
  )
  assert audit.requirements(tmp_path) == [
    ('requirements.txt', 'jax==1'),
    ('requirements.txt', 'numpy'),
    ('Makefile', 'torch==2'),
    ('Makefile', 'numpy'),
  ]
  assert audit.sdists(tmp_path) == ['x', 'y']


def test_a_version_is_one_exact_one(audit):
  for line in ('a==1', "a==1; python_version < '3'", 'a==1 --hash=sha256:0'):
    assert audit.has_version(line)
  for line in ('a', 'a>=1', 'a==1.*', 'a==1,<2', 'a~=1.0'):
    assert not audit.has_version(line)


def test_packages_bring_others_along(audit, monkeypatch):
  wishes = {'a': ['B_b>1', "c; extra == 'x'"], 'b-b': ['a', 'd'], 'd': None}

  def distribution(name):
    if name not in wishes:
      raise audit.importlib.metadata.PackageNotFoundError(name)
    return types.SimpleNamespace(version='1', requires=wishes[name])

  monkeypatch.setattr(audit.importlib.metadata, 'distribution', distribution)
  assert audit.brought_along(['A', 'unknown']) == ['b-b==1', 'd==1']
