"""metrics.jsonl and the TensorBoard files."""

import errno
import json
import math
import resource
import struct
import threading

import pytest
from tensorboardX.proto.event_pb2 import Event

from psa_jax.config import RunError
from psa_jax.train import metrics as lib
from tests.train import tiny


def row(kind, step, **more):
  return {'kind': kind, 'step': step, **more}


ROWS = [
  row('train', 1, loss=2.5),
  row('train', 2, loss=2.0),
  row('eval', 2, loss=2.1),
  row('train', 3, loss=1.5),
  row('final', 3, loss=1.6),
]


@pytest.fixture
def path(tmp_path):
  path = tmp_path / lib.METRICS
  path.write_text(''.join(json.dumps(r) + '\n' for r in ROWS))
  return path


# An evaluation comes after the checkpoint of its step, so it is made again.
@pytest.mark.parametrize(
  ('step', 'kept'), [(0, 0), (1, 1), (2, 2), (3, 4), (9, 5)]
)
def test_a_resumed_run_drops_what_it_will_write_again(path, step, kept):
  file = lib.MetricsFile(path, step=step)
  assert file.rows == ROWS[:kept] == lib.read_rows(path)
  file.write(row('train', step + 1, loss=1.0))
  file.close()
  expected = [*ROWS[:kept], row('train', step + 1, loss=1.0)]
  assert lib.read_rows(path) == expected
  assert len(path.read_text().splitlines()) == len(expected)


@pytest.mark.parametrize('cut', [1, 2, 20])
def test_a_half_written_line_is_dropped(path, cut):
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  file = lib.MetricsFile(path, step=9)
  file.write(ROWS[-1])
  file.close()
  assert path.read_bytes() == whole


DAMAGED = (
  b'{"kind": "train", "step": 1, "lo\xffs": 2.5}',
  b'{"kind": "train", "step": "2", "loss": 2.0}',
  b'{"kind": "train", "step": 1e30, "loss": 2.0}',
  b'{"kind": "train", "step": true, "loss": 2.0}',
  b'{"kind": "train", "step": 2, "loss": "2.0"}',
  b'{"kind": "trbin", "step": 2, "loss": 2.0}',
  b'{"kind": ["train"], "step": 2, "loss": 2.0}',
  b'{"kind": "train", "stfp": 2, "loss": 2.0}',
  b'["not a row"]',
  b'{"kind": ' * 3000 + b'}' * 3000,
  b'',
)


def test_a_damaged_line_costs_no_other(path):
  """What is left out is said by number, and the file kept as it was."""
  lines = path.read_bytes().splitlines()
  harmed = b'\n'.join([lines[0], *DAMAGED, *lines[1:], b''])
  path.write_bytes(harmed)
  said = []
  assert lib.read_rows(path, said.append) == ROWS
  file = lib.MetricsFile(path, step=3, say=said.append)
  assert file.rows == ROWS[:4] == lib.read_rows(path)
  file.write(ROWS[4])
  file.close()
  assert path.read_bytes() == b'\n'.join([*lines, b''])
  assert path.with_name('metrics.jsonl.corrupt').read_bytes() == harmed
  assert len(said) == 2
  for text in ('line 2 (not JSON)', 'line 3 (step is no count)', 'and 6 more'):
    assert text in said[1] and text in said[0]
  assert 'kept as metrics.jsonl.corrupt' in said[1]
  lib.MetricsFile(path, step=3, say=said.append).close()
  assert len(said) == 2


def test_a_full_disk_names_the_file(path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  file = lib.MetricsFile(path, step=9)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
  try:
    with pytest.raises(RunError, match='metrics.jsonl: File too large'):
      file.write(row('train', 4, loss=1.25))
    file.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert lib.read_rows(path) == ROWS


def test_a_number_that_is_no_json_is_null(tmp_path):
  file = lib.MetricsFile(tmp_path / 'm', step=0)
  file.write(row('train', 1, loss=math.nan, mass=math.inf, density=0.5))
  file.close()
  (found,) = lib.read_rows(tmp_path / 'm')
  assert found == row('train', 1, loss=None, mass=None, density=0.5)


def test_an_open_file_survives_a_reader(tmp_path):
  """Every row is there at once, for a tail -f or after a kill."""
  file = lib.MetricsFile(tmp_path / 'm', step=0)
  file.write(ROWS[0])
  assert lib.read_rows(tmp_path / 'm') == ROWS[:1]
  file.close()


def events(folder):
  """Every event of every file, in order (the records of TFRecord)."""
  for path in sorted(folder.glob('events*')):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      yield Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def test_tensorboard_has_the_rows_and_the_hparams(tmp_path):
  config = tiny.config()
  log = lib.Log(config, tmp_path, step=0, mechanisms=('psa', 'dense'))
  for r in (*ROWS[:4], row('final', 3, mechanism='dense', bits_per_byte=2.3)):
    log.write(r)
  log.close()
  found = list(events(tmp_path / lib.TENSORBOARD))
  scalars = {
    (value.tag, event.step): value.simple_value
    for event in found
    for value in event.summary.value
    if value.HasField('simple_value')
  }
  assert scalars['train/loss', 1] == 2.5
  assert scalars['eval/loss', 2] == pytest.approx(2.1)
  assert scalars['train/loss', 3] == 1.5
  assert scalars['final_dense/bits_per_byte', 3] == pytest.approx(2.3)
  hparams = b''.join(
    value.metadata.plugin_data.content
    for event in found
    for value in event.summary.value
  )
  for name in (b'optim.learning_rate', b'model.norm.kind', b'prepbn'):
    assert name in hparams
  # Keys as they are by default are no columns; each arm's quality is one.
  for name in (b'optim.eps', b'model.attention.sla.', b'data.cutout'):
    assert name not in hparams
  for name in (b'model.attention.name', b'final_psa/bits', b'final_dense/bits'):
    assert name in hparams
  assert len(list((tmp_path / lib.TENSORBOARD).iterdir())) == 1


def test_tensorboard_hides_what_a_resumed_run_makes_again(tmp_path):
  for step in (0, 2):
    (tmp_path / str(step)).mkdir()
    log = lib.Log(tiny.config(), tmp_path / str(step), step=step)
    log.write(row('train', step + 1, loss=1.0))
    log.close()
  starts = [
    [
      e.step
      for e in events(tmp_path / name / lib.TENSORBOARD)
      if e.HasField('session_log')
    ]
    for name in ('0', '2')
  ]
  assert starts == [[], [3]]


def test_a_disk_that_fills_up_ends_the_events_and_not_the_run(tmp_path, caplog):
  """TensorboardX's writer thread lives on; its queue holds ten events."""
  board = lib.TensorBoard(tmp_path, {}, metrics=['final/loss'], step=0)
  events = board._writer.file_writer.event_writer

  def full(event):
    raise OSError(errno.ENOSPC, 'No space left on device')

  events._ev_writer._py_recordio_writer.write = full

  def use():
    for step in range(1, 40):
      board.write(row('train', step, loss=1.0, density=1.0))
    board.close()

  thread = threading.Thread(target=use, daemon=True)
  thread.start()
  thread.join(timeout=60)
  assert not thread.is_alive(), 'a write waits for ever'
  assert caplog.text.count('metrics.jsonl goes on') == 1
