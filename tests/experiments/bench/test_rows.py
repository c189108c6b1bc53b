"""Rows: written as they are measured, found again, the newest shown."""

import json

import pytest

from experiments.bench import rows, timing
from experiments.bench.rows import Book

pytestmark = pytest.mark.tier('default')

KEY = ('what', 'length', 'contender', 'pass')
STAMP = {'commit': 'abc', 'date': 'today', 'machine': 'two cores'}


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'results.jsonl'


def timed(what, length, contender, seconds, commit='abc'):
  about = {'what': what, 'length': length, 'contender': contender}
  return {**about, 'pass': 'x', 'median': seconds, 'commit': commit}


def test_a_torn_last_line_is_dropped_and_a_torn_other_one_is_not(path):
  assert rows.read(path) == []
  rows.append(path, {'seed': 0})
  with path.open('a') as file:
    file.write(json.dumps({'seed': 1})[:5])
  assert rows.read(path) == [{'seed': 0}]
  rows.append(path, {'seed': 2})
  assert rows.read(path) == [{'seed': 0}, {'seed': 2}]
  path.write_text('{"torn\n' + path.read_text())
  with pytest.raises(json.JSONDecodeError):
    rows.read(path)


def test_rows_are_stamped_and_written_as_they_are_measured(path):
  book = Book(path, KEY, STAMP)
  book.add({'what': 'decode', 'length': 8})
  (row,) = rows.read(path)
  assert row == book.rows[0]
  assert row['what'] == 'decode'
  assert set(row) == {'what', 'length', 'began', 'load', *STAMP}


def test_a_book_without_a_file_writes_nothing():
  book = Book(None, KEY, STAMP)
  book.add({'what': 'decode'})
  assert book.all() == book.rows


def sweep(book, contenders):
  book.sweep(contenders, repeats=1, what='decode', length=64)


def test_resuming_skips_what_this_commit_has(path):
  asked = []

  def contender(name):
    return lambda calls: asked.append(name) or 3.0

  sweep(Book(path, KEY, STAMP), {('a', 'x'): contender('a')})
  with path.open('a') as file:
    file.write(json.dumps(timed('decode', 64, 'b', 1.0, 'another')) + '\n')
  asked.clear()
  both = {('a', 'x'): contender('a'), ('b', 'x'): contender('b')}
  sweep(Book(path, KEY, STAMP, resume=True), both)
  assert set(asked) == {'b'}
  sweep(Book(path, KEY, STAMP), both)
  assert set(asked) == {'a', 'b'}


def test_a_sweep_adds_what_is_known_of_a_contender(path):
  def fails(calls):
    raise timing.Unavailable('no such thing')

  book = Book(path, KEY, STAMP)
  about = {'a': {'blocks': 24}}
  pair = {('a', 'x'): lambda calls: 3.0, ('b', 'x'): fails}
  book.sweep(pair, repeats=2, about=about, what='decode', length=64)
  good, bad = rows.read(path)
  assert (good['median'], good['seconds'], good['blocks']) == (3, [3, 3], 24)
  assert bad['error'] == 'no such thing' and 'blocks' not in bad


def test_the_last_row_of_a_subject_counts():
  found = [timed('a', 1, 'x', 1.0), timed('a', 2, 'x', 2.0)]
  found.append(timed('a', 1, 'x', 3.0))
  assert [row['median'] for row in rows.newest(found, KEY)] == [3.0, 2.0]


def test_of_one_commit_the_newest_of_each_measurement_counts():
  found = [
    timed('decode', 64, 'a', 1.0, 'old'),
    timed('decode', 64, 'b', 1.0, 'old'),
    timed('peak', 64, 'a', 1.0, 'old'),
    timed('decode', 64, 'a', 2.0, 'new'),
    timed('decode', 64, 'a', 3.0, 'new'),
  ]
  newest = rows.newest(found, KEY, one_commit=True)
  assert [(row['what'], row['median']) for row in newest] == [
    ('peak', 1.0),
    ('decode', 3.0),
  ]
