"""Every file of a work directory damaged: the right numbers, or a refusal."""

import random

import pytest

from tests.fuzz import files

pytestmark = pytest.mark.tier('default')

COUNT = 40  # `make soak` draws from all


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return files.Folders(tmp_path_factory.mktemp('fuzz'))


def test_a_damaged_folder_gives_the_right_numbers_or_a_refusal(folders):
  faults = []
  for number in range(COUNT):
    action = files.ACTIONS[number % len(files.ACTIONS)]
    read = files.READ[action]
    kind = files.DAMAGES[number % len(files.DAMAGES)]
    case = files.Case(read[number // 5 % len(read)], kind, action, number)
    faults.append(folders.fault(case))
  assert [fault for fault in faults if fault] == []


@pytest.mark.parametrize('kind', sorted(set(files.DAMAGES)))
def test_damage_changes_a_file(tmp_path, kind):
  path = tmp_path / 'a'
  content = b'{"a": 1}\n{"b": 2}\n'
  path.write_bytes(content)
  files.damage(path, kind, random.Random(3))
  assert not path.is_file() or path.read_bytes() != content


def test_other_numbers_are_seen(folders, monkeypatch):
  """Of the comparison itself."""
  wrong = dict.fromkeys(folders._right, 'other')
  case = files.Case('environment.json', 'absent', 'eval', 0)
  assert folders.fault(case) is None
  monkeypatch.setattr(folders, '_right', wrong)
  assert 'wrong: other numbers' in folders.fault(case)
