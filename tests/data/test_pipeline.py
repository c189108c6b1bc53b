"""The train stream: shuffled, shared out, resumable; evaluation: complete."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_jax.config import ConfigError
from psa_jax.data import pipeline
from psa_jax.data.text.windows import Packed, windows

ROOT = Path(__file__).resolve().parents[2]
T = 4


def source(count=60, split='train'):
  """Windows whose inputs are all the window's own number, plus one.

  Sixty of them and batches of twelve: five batches an epoch.
  """
  tokens = np.append(np.repeat(np.arange(1, count + 1), T), 0)
  starts = np.array([0], np.int64)
  packed = Packed(tokens.astype(np.uint16), starts, split)
  return windows(packed, seq_len=T, cut_documents=False)


def stream(windows=None, batch_size=12, seed=7, process=0, count=1):
  return pipeline.train_iterator(
    windows or source(),
    batch_size=batch_size,
    seed=seed,
    process_index=process,
    process_count=count,
  )


def take(iterator, steps):
  """Window numbers of the next batches, [steps, b]."""
  batches = [next(iterator)['inputs'] for _ in range(steps)]
  assert all((b == b[:, :1]).all() for b in batches)
  return np.array([b[:, 0] - 1 for b in batches])


def take_all(count, steps, state=None, batch_size=12):
  """The batches of all hosts, [steps, batch_size], and their states."""
  hosts = [
    stream(process=i, count=count, batch_size=batch_size) for i in range(count)
  ]
  for host in hosts:
    if state:
      host.set_state(state)
  rows = np.concatenate([take(host, steps) for host in hosts], axis=1)
  return rows, [host.get_state() for host in hosts]


def test_batches_have_the_documented_form():
  batch = next(stream())
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'inputs': ((12, T), 'int32'),
    'targets': ((12, T), 'int32'),
    'segment_ids': ((12, T), 'int32'),
    'positions': ((12, T), 'int32'),
    'weights': ((12, T), 'float32'),
  }


def test_every_epoch_has_every_window_once_in_its_own_order():
  order = take(stream(), 20).reshape(4, 60)
  assert all(sorted(epoch) == list(range(60)) for epoch in order)
  assert len({tuple(epoch) for epoch in order}) == 4
  assert not any((epoch == np.arange(60)).all() for epoch in order)


def test_same_seed_same_stream():
  first, second = take(stream(seed=3), 9), take(stream(seed=3), 9)
  np.testing.assert_array_equal(first, second)
  assert (take(stream(seed=4), 9) != first).any()


@pytest.mark.tier('default')
def test_stream_is_the_same_in_another_process():
  code = """
import json
import test_pipeline
print(json.dumps(test_pipeline.take(test_pipeline.stream(), 6).tolist()))
"""
  path = f'{ROOT}:{Path(__file__).parent}'
  environment = {**os.environ, 'PYTHONPATH': path, 'PYTHONHASHSEED': '42'}
  out = subprocess.check_output([sys.executable, '-c', code], env=environment)
  assert json.loads(out) == take(stream(), 6).tolist()


@settings(max_examples=8)
@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 6))
def test_resumed_equals_uninterrupted(before, lost, after):
  """Also where the saved state is older than where the stream had got to."""
  whole = take(stream(), before + after)
  interrupted = stream()
  if before:
    take(interrupted, before)
  state = json.dumps(interrupted.get_state())
  if lost:
    take(interrupted, lost)
  for fresh in (stream(), interrupted):
    fresh.set_state(json.loads(state))
    assert fresh.get_state() == json.loads(state)
    np.testing.assert_array_equal(take(fresh, after), whole[before:])


def noisy(window, rng):
  return {**window, 'inputs': window['inputs'] + 1000 * rng.integers(1, 99)}


@pytest.mark.parametrize('threads', [1, 3])
def test_threads_read_the_same_batches(threads):
  def numbers(threads, before=0):
    windows = pipeline.train_iterator(
      source(), batch_size=12, seed=7, augment=noisy, threads=threads
    )
    with contextlib.closing(windows):
      for _ in range(before):
        next(windows)
      state = windows.get_state()
      windows.set_state(json.loads(json.dumps(state)))
      return state, take(windows, 11 - before)

  state, whole = numbers(0)
  assert len(np.unique(whole // 1000)) > 40
  np.testing.assert_array_equal(numbers(threads)[1], whole)
  # What was read ahead and not taken is read again.
  state, rest = numbers(threads, before=4)
  assert state['next_window'] == 48
  np.testing.assert_array_equal(rest, whole[4:])


def test_batches_are_really_read_ahead_and_by_several_threads():
  class Slow:
    def __init__(self):
      self.came, self.meeting = itertools.count(), threading.Barrier(3)

    def __len__(self):
      return 12

    def __getitem__(self, i):
      if next(self.came) < 3:
        self.meeting.wait(timeout=30)  # until three are here, or an error
      return {'inputs': np.full(T, i), 'weights': np.ones(1, np.float32)}

  windows = pipeline.train_iterator(Slow(), batch_size=1, seed=0, threads=3)
  with contextlib.closing(windows):
    next(windows)
  judged = pipeline.eval_batches(Slow(), limit=12, batch_size=3, threads=3)
  assert [b['inputs'][:, 0].tolist() for b in judged] == [
    [0, 1, 2],
    [3, 4, 5],
    [6, 7, 8],
    [9, 10, 11],
  ]


def test_all_fields_resume():
  first, second = stream(), stream()
  next(first)
  second.set_state(first.get_state())
  a, b = next(first), next(second)
  assert all((a[key] == b[key]).all() for key in a)


@pytest.mark.parametrize('count', [2, 4])
def test_hosts_share_a_batch_without_overlap(count):
  alone, _ = take_all(1, 10)
  shared, states = take_all(count, 10)
  np.testing.assert_array_equal(np.sort(shared), np.sort(alone))
  assert all(state == states[0] for state in states)
  hosts = [take(stream(process=i, count=count), 5) for i in range(count)]
  assert all(host.shape == (5, 12 // count) for host in hosts)
  first_epoch = np.concatenate([host.ravel() for host in hosts])
  assert len(set(first_epoch.tolist())) == len(first_epoch) == 60


@pytest.mark.parametrize('before, after', [(1, 4), (2, 4), (4, 1), (4, 2)])
def test_state_holds_for_another_number_of_hosts(before, after):
  whole, _ = take_all(1, 12)
  first, states = take_all(before, 5)
  state = json.loads(json.dumps(states[-1]))
  rest, _ = take_all(after, 7, state)
  together = np.concatenate([first, rest])
  np.testing.assert_array_equal(np.sort(together), np.sort(whole))


def test_state_holds_for_another_batch_size():
  first, states = take_all(1, 3)
  rest, _ = take_all(1, 5, states[0], batch_size=6)
  order = np.concatenate([first.ravel(), rest.ravel()])
  np.testing.assert_array_equal(order, take(stream(batch_size=1), 66).ravel())


def test_state_of_other_data_is_refused():
  state = stream().get_state()
  with pytest.raises(ConfigError, match='seed=7, this run has seed=8'):
    stream(seed=8).set_state(state)
  with pytest.raises(ConfigError, match='windows=60, this run has windows=61'):
    stream(source(61)).set_state(state)
  with pytest.raises(ConfigError, match='seed=None'):
    stream().set_state({'next_window': 4, 'windows': 60})


def test_batches_larger_than_the_data_repeat_it():
  rows = take(stream(source(3), batch_size=6), 4)
  counts = np.bincount(rows.ravel(), minlength=3)
  assert counts.tolist() == [8, 8, 8]
  assert take(stream(source(1), batch_size=2), 2).tolist() == [[0, 0]] * 2


@pytest.mark.parametrize(
  'keys, message',
  [
    ({'batch_size': 6, 'count': 4}, '6 windows cannot be shared by 4'),
    ({'batch_size': 0}, '0 windows cannot be shared'),
    ({'batch_size': -4, 'count': 2}, 'positive multiple'),
    ({'seed': -1}, 'seed is -1'),
    ({'seed': 2**32}, 'seed is'),
  ],
)
def test_impossible_streams_are_refused(keys, message):
  with pytest.raises(ConfigError, match=message):
    stream(**keys)


def judged(batches):
  """Numbers of the windows that count, from batches of one or more hosts."""
  return [
    int(row[0]) - 1
    for batch in batches
    for row, weight in zip(batch['inputs'], batch['weights'], strict=True)
    if weight.any()
  ]


@given(
  st.integers(1, 13), st.integers(0, 15), st.sampled_from([1, 2, 4]), st.data()
)
def test_evaluation_judges_each_chosen_window_once(windows, limit, hosts, data):
  batch_size = hosts * data.draw(st.integers(1, 3))
  shares = [
    pipeline.eval_batches(
      source(windows, 'validation'),
      batch_size=batch_size,
      limit=limit,
      process_index=i,
      process_count=hosts,
    )
    for i in range(hosts)
  ]
  batches = [batch for share in shares for batch in share]
  chosen = sorted(judged(batches))
  count = min(limit or windows, windows)
  assert len(chosen) == len(set(chosen)) == count
  assert set(chosen) <= set(range(windows))
  gaps = np.diff([*chosen, chosen[0] + windows])
  assert gaps.max() - gaps.min() <= 1  # evenly over the split
  assert {len(share) for share in shares} == {-(-count // batch_size)}
  rows = batch_size // hosts
  assert all(batch['inputs'].shape == (rows, T) for batch in batches)
  assert all((batch['inputs'] > 0).all() for batch in batches)


def test_evaluation_repeats_itself():
  batches = pipeline.eval_batches(
    source(5, 'validation'), batch_size=2, limit=3
  )
  assert judged(batches) == judged(batches) == [0, 1, 3]
  with pytest.raises(ConfigError, match='-1 evaluation windows'):
    pipeline.eval_batches(source(), batch_size=1, limit=-1)
