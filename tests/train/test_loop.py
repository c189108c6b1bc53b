"""Whole runs: what they leave, killed on the way and not."""

import dataclasses
import json
import shutil
import signal
import socket

import jax
import numpy as np
import pytest

from psa_jax import sharding
from psa_jax.config import (
  CheckpointConfig,
  ConfigError,
  EvalConfig,
  NormConfig,
  RunError,
  json_text,
)
from psa_jax.tasks import LanguageModel
from psa_jax.train import lock, loop, optim
from psa_jax.train.checkpoint import Checkpoints
from tests.train import tiny
from tests.train.runs import assert_same_run, interrupted, rows, saved, start

pytestmark = pytest.mark.tier('default')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return tmp_path_factory.mktemp('text')


@pytest.fixture(scope='module')
def config(text):
  return tiny.config(source=tiny.write_text(text))


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """Folder and result of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp('whole')
  return folder, loop.train_and_evaluate(config, folder)


def test_a_run_leaves_its_record(whole, config):
  folder, result = whole
  names = {path.name for path in folder.iterdir()}
  assert names >= {
    *('config.json', 'command.txt', 'environment.json', 'data_manifest.json'),
    *('metrics.jsonl', 'result.json', 'tensorboard', 'checkpoints'),
  }
  written = json.loads((folder / 'result.json').read_text())
  assert json_text.unsealed(written) == result
  found = rows(folder)
  trained = [row for row in found if row['kind'] == 'train']
  assert [row['step'] for row in trained] == list(range(1, 8))
  assert [row['stage'] for row in trained] == [0] * 4 + [1] * 3
  assert [row['seq_len'] for row in trained] == [16] * 4 + [32] * 3
  assert [r['step'] for r in found if r['kind'] == 'eval'] == [3, 6]
  assert [r['mechanism'] for r in found if r['kind'] == 'final'] == ['dense']
  gammas = [row['gamma'] for row in trained]
  assert gammas == pytest.approx([1 - i / 6 for i in range(7)], abs=1e-6)
  assert not {'fault', 'weight'} & set().union(*trained)


def test_the_result_says_what_was_reached_and_what_it_cost(whole, config):
  _, result = whole
  assert result['step'] == 7
  assert result['tokens'] == 4 * 8 * 16 + 3 * 4 * 32
  found = result['validation']['dense']
  assert found['windows'] == 3 and found['seq_len'] == 32
  assert found['tokens'] == 3 * 32
  assert 0 < found['bits_per_byte'] < 9
  assert found['bits_per_byte'] == pytest.approx(found['loss'] / np.log(2))
  assert result['baselines'].keys() == {'unigram', 'bigram'}
  assert result['peak_memory_bytes'] > 2**20
  for stage in result['stages']:
    assert stage['compile_seconds'] > 0
    for edge in ('start', 'end'):
      assert stage[edge]['density'] == 1
      assert stage[edge]['seconds_per_step'] > 0
  assert result['stages'][-1]['end']['gamma'] == pytest.approx(0, abs=1e-6)


def test_the_same_command_again_only_shows_the_table(whole, config, capsys):
  folder, result = whole
  before = (folder / 'metrics.jsonl').read_bytes()
  assert loop.train_and_evaluate(config, folder) == result
  shown = capsys.readouterr().out
  assert 'is complete: 7 steps' in shown
  for label in ('bits per byte, dense', 'bigram', 'peak memory'):
    assert label in shown
  assert (folder / 'metrics.jsonl').read_bytes() == before


def test_a_finished_run_can_be_lengthened(whole, config, tmp_path, capsys):
  """And only then moves on: the last stage's data goes on where it was."""
  folder = tmp_path / 'longer'
  shutil.copytree(whole[0], folder)
  train = dataclasses.replace(config.train, steps=(4, 5))
  longer = dataclasses.replace(config, train=train)
  result = loop.train_and_evaluate(longer, folder)
  assert 'going on from step 7 of 9' in capsys.readouterr().out
  assert result['step'] == 9
  assert [r['step'] for r in rows(folder) if r['kind'] == 'train'] == list(
    range(1, 10)
  )
  assert [r['step'] for r in rows(folder) if r['kind'] == 'final'] == [9]
  train = dataclasses.replace(config.train, steps=(4, 2))
  with pytest.raises(RunError, match='checkpoint of step 9 is beyond'):
    loop.train_and_evaluate(dataclasses.replace(config, train=train), folder)


def test_a_checkpoint_that_does_not_fit_binds_nothing(whole, config, tmp_path):
  """After a change that was allowed and failed, the old command goes on."""
  folder = tmp_path / 'wider'
  shutil.copytree(whole[0], folder)
  model = dataclasses.replace(config.model, mlp_dim=64)
  train = dataclasses.replace(config.train, steps=(4, 4))
  wider = dataclasses.replace(config, model=model, train=train)
  # But the lock's file, which says who had it last.
  before = {
    p: p.read_bytes()
    for p in folder.iterdir()
    if p.is_file() and p.name != 'lock'
  }
  with pytest.raises(RunError, match='no checkpoint in .* can be read'):
    loop.train_and_evaluate(wider, folder, allow_config_change=True)
  assert before == {p: p.read_bytes() for p in before}
  assert loop.train_and_evaluate(config, folder) == whole[1]


def test_kill_9_and_resume_equals_a_run_that_was_not_killed(
  whole, config, text, tmp_path, capsys
):
  """In the first stage; the second one starts after the restart."""
  code, _ = interrupted(tmp_path, text, signal.SIGKILL, 3)
  assert code == -signal.SIGKILL
  assert not (tmp_path / 'result.json').exists()
  loop.train_and_evaluate(config, tmp_path)
  assert 'going on from step' in capsys.readouterr().out
  assert_same_run(config, whole[0], tmp_path)


# Before: the first checkpoint has its name, a row of metrics is appended, the
# record is complete, an old checkpoint is removed, the result is written.
POINTS = (
  'checkpoint:Checkpoints._seal:1',
  'metrics:MetricsFile.write:5',
  'workdir:write_bytes:3',
  'checkpoint:shutil.rmtree:1',
  'run:result_lib.save:1',
)


@pytest.mark.tier('ci')
def test_killed_at_five_points_one_after_the_other(
  whole, config, text, tmp_path
):
  for point in POINTS:
    code, output = interrupted(tmp_path, text, signal.SIGKILL, point)
    assert code == -signal.SIGKILL, output
    assert 'Traceback' not in output
  loop.train_and_evaluate(config, tmp_path)
  assert_same_run(config, whole[0], tmp_path)
  assert not [p for p in tmp_path.rglob('*') if 'tmp' in p.name]


def test_what_only_tracing_refuses_binds_nothing(config, tmp_path):
  attention = dataclasses.replace(
    config.model.attention, implementation='pallas_tpu'
  )
  model = dataclasses.replace(config.model, attention=attention)
  bad = dataclasses.replace(config, model=model)
  with pytest.raises(ConfigError, match='pallas_tpu'):
    loop.train_and_evaluate(bad, tmp_path)
  assert not (tmp_path / 'config.json').exists()


def test_sigterm_saves_exits_0_and_resumes_inside_the_last_stage(
  whole, config, text, tmp_path, capsys
):
  code, output = interrupted(tmp_path, text, signal.SIGTERM, 5)
  assert code == 0, output
  assert 'SIGTERM: saving after this step' in output
  assert 'stopped at step 6 of 7' in output
  assert 'the same command goes on' in output
  assert saved(config, tmp_path).step == 6
  loop.train_and_evaluate(config, tmp_path)
  assert 'going on from step 6 of 7' in capsys.readouterr().out
  assert_same_run(config, whole[0], tmp_path)


def test_two_processes_train_as_one(whole, config, text, tmp_path):
  """Each reads its own rows; only the first one writes and speaks."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  processes = [
    start(
      *('config_for_all_devices', tmp_path, text),
      XLA_FLAGS='',  # one device each
      JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}',
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert 'step 3/3' in outputs[0] and 'step 3/3' not in outputs[1]
  found = [row for row in rows(tmp_path) if row['kind'] == 'train']
  assert len(found) == 3
  for row, expected in zip(found, rows(whole[0]), strict=False):
    assert row.pop('kind') == expected.pop('kind')
    assert row == pytest.approx(expected, rel=1e-4)


def test_one_compilation_a_stage(config, tmp_path):
  """Over both stages, every schedule, evaluations and checkpoints."""
  compiled = []

  def listen(event, duration, **more):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(more.get('fun_name'))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    loop.train_and_evaluate(config, tmp_path)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert sum('train_step' in name for name in compiled) == 2
  assert sum('eval_step' in name for name in compiled) == 1


def poison(monkeypatch, at):
  """Makes one batch's weights infinite, as data that overflows would be."""
  iterator = LanguageModel.train_iterator

  def train_iterator(self, stage):
    return Poisoned(iterator(self, stage))

  class Poisoned:
    def __init__(self, real):
      self.get_state, self.set_state = real.get_state, real.set_state
      self.real, self.close = real, real.close

    def __next__(self):
      batch = next(self.real)
      if self.get_state()['next_window'] == at:
        batch = {**batch, 'weights': batch['weights'] * np.float32(np.inf)}
      return batch

  monkeypatch.setattr(LanguageModel, 'train_iterator', train_iterator)


def test_a_loss_that_is_not_finite_stops_with_everything_saved(
  whole, config, tmp_path, monkeypatch
):
  """Seen one step late: the state and the data go back to before it."""
  with monkeypatch.context() as patch:
    poison(patch, at=2 * 8)
    never = dataclasses.replace(config.checkpoint, every=0)
    with pytest.raises(RunError) as error:
      loop.train_and_evaluate(
        dataclasses.replace(config, checkpoint=never), tmp_path
      )
  message = str(error.value)
  assert 'step 2: loss is not finite' in message and '\n' not in message
  assert 'the last good checkpoint is step 1 in' in message
  assert [row['step'] for row in rows(tmp_path)] == [1]
  found = saved(config, tmp_path)
  assert found.step == 1 and found.state.fault == 0
  # Without the bad batch the run ends as if nothing had happened.
  loop.train_and_evaluate(config, tmp_path)
  assert_same_run(config, whole[0], tmp_path)


def diverging(config, *, steps, keep=1):
  """Every step saves; the update of step 3 has a learning rate of 1e5."""
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, norm=NormConfig(kind='rmsnorm')),
    train=dataclasses.replace(
      config.train, steps=(steps,), seq_len=(16,), batch_size=(8,)
    ),
    checkpoint=CheckpointConfig(every=1, keep=keep),
    eval=EvalConfig(windows=2),
  )


def explode(monkeypatch, at):
  """The learning rate of one update, as a schedule with a slip would."""
  learning_rate = optim.learning_rate

  def slip(config, total):
    rate = learning_rate(config, total)
    if config.learning_rate < 0.01:
      return rate
    return lambda step: jax.numpy.where(step == at, 1e5, rate(step))

  monkeypatch.setattr(optim, 'learning_rate', slip)


def names(folder):
  return {path.name for path in (folder / 'checkpoints').iterdir()}


def test_a_run_that_diverges_keeps_its_last_good_state_and_goes_on_from_it(
  config, tmp_path, monkeypatch, capsys
):
  """Step 3 ruins the parameters; they stay finite until step 4 reads them."""
  explode(monkeypatch, at=2)
  bad = diverging(config, steps=6)
  with pytest.raises(RunError) as error:
    loop.train_and_evaluate(bad, tmp_path)
  message = str(error.value)
  assert 'step 4: loss is not finite' in message and '\n' not in message
  assert 'state of step 3 is ruined' in message
  assert 'last good checkpoint is step 2 in' in message
  assert 'on with --resume_from=2 --allow_config_change' in message
  assert names(tmp_path) == {'2', '3.ruined'}
  optimizer = dataclasses.replace(bad.optim, learning_rate=0.009)
  lower = dataclasses.replace(bad, optim=optimizer)
  result = loop.train_and_evaluate(
    lower, tmp_path, allow_config_change=True, resume_from=2
  )
  assert 'going on from step 2 of 6' in capsys.readouterr().out
  assert result['validation']['dense']['loss'] < 5.545
  trained = [row['step'] for row in rows(tmp_path) if row['kind'] == 'train']
  assert trained == [1, 2, 3, 4, 5, 6]
  # Back again, and to the beginning: nothing is lost.
  with pytest.raises(ConfigError, match=r'resume_from=5: .*there: 6; 0 begins'):
    loop.train_and_evaluate(lower, tmp_path, resume_from=5)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  again = loop.train_and_evaluate(lower, tmp_path, resume_from=0)
  assert again['step'] == 6
  assert names(tmp_path) == {'6', '6.aside', '3.ruined'}
  assert (tmp_path / 'metrics.jsonl.aside1').read_bytes() == before
  kept = json.loads((tmp_path / 'result.json.aside').read_text())
  assert json_text.unsealed(kept) == result


def test_a_run_whose_last_step_ruins_it_fails(config, tmp_path, monkeypatch):
  """Not with the 8 bits per byte of a guess: all logits would be 0."""
  explode(monkeypatch, at=2)
  bad = diverging(config, steps=3, keep=2)
  with pytest.raises(RunError) as error:
    loop.train_and_evaluate(bad, tmp_path)
  message = str(error.value)
  assert 'step 3: the validation loss with dense attention is nan' in message
  assert 'on with --resume_from=2 --allow_config_change' in message
  assert names(tmp_path) == {'2', '3.ruined'}
  assert not (tmp_path / 'result.json').exists()


def test_a_broken_newest_checkpoint_falls_back_and_ends_the_same(
  whole, config, tmp_path, capsys
):
  """The metrics are cut back to the checkpoint that was read."""
  folder = tmp_path / 'run'
  shutil.copytree(whole[0], folder)
  (folder / 'result.json').unlink()
  assert Checkpoints(folder / 'checkpoints', read_only=True).steps() == [6, 7]
  for path in (folder / 'checkpoints' / '7' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-1])
  loop.train_and_evaluate(config, folder)
  shown = capsys.readouterr().out
  assert 'cannot read the checkpoint of step 7' in shown
  assert 'going on from step 6 of 7' in shown
  assert_same_run(config, whole[0], folder)


def test_evaluation_of_a_checkpoint_agrees_with_the_run(whole, config, capsys):
  folder, result = whole
  before = sorted(folder.rglob('*'))
  found = loop.evaluate_checkpoint(config, folder)
  assert found['step'] == 7
  for name in ('loss', 'bits_per_byte', 'density', 'windows'):
    assert (
      found['validation']['dense'][name]
      == (result['validation']['dense'][name])
    )
  shown = capsys.readouterr().out
  for label in ('bits per byte, dense', 'seconds per window', 'peak memory'):
    assert label in shown
  assert sorted(folder.rglob('*')) == before


def test_evaluation_without_a_checkpoint_is_refused(config, tmp_path):
  with pytest.raises(RunError, match='there is no checkpoint'):
    loop.evaluate_checkpoint(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_a_window_is_refused_before_the_first_step(
  config, tmp_path
):
  """Also if the window is the last stage's."""
  train = dataclasses.replace(config.train, seq_len=(16, 1_000_000))
  with pytest.raises(ConfigError, match='a window of 1000000 tokens'):
    loop.train_and_evaluate(dataclasses.replace(config, train=train), tmp_path)
  assert not (tmp_path / 'checkpoints').exists()
  assert loop.train_and_evaluate(config, tmp_path)['step'] == 7


def test_a_batch_that_the_devices_cannot_share_is_refused(config, tmp_path):
  mesh = dataclasses.replace(config.mesh, data=8)
  with pytest.raises(ConfigError, match='entry 4, which does not split'):
    loop.train_and_evaluate(dataclasses.replace(config, mesh=mesh), tmp_path)


def test_a_vocabulary_below_the_tokenizers_is_refused(config, tmp_path):
  model = dataclasses.replace(config.model, vocab_size=100)
  with pytest.raises(ConfigError, match='vocab_size=100 is below the 256'):
    loop.train_and_evaluate(dataclasses.replace(config, model=model), tmp_path)


def test_batches_reach_every_device_of_the_mesh(config):
  mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=4))
  task = LanguageModel(config, tiny.corpus(), mesh)
  seen = []

  def eval_step(state, batch):
    seen.append(batch['inputs'].sharding.device_set)
    raise StopIteration

  with pytest.raises(StopIteration):
    task.evaluate(eval_step, None, before_batch=lambda: None)
  assert len(seen[0]) == 4


def test_one_run_at_a_time_in_a_work_directory(whole, config, tmp_path):
  """Readers share; the refusal says who, where and since when."""
  folder = tmp_path / 'run'
  shutil.copytree(whole[0], folder)
  more = dataclasses.replace(
    config, train=dataclasses.replace(config.train, steps=(4, 4))
  )
  calls = {
    'train': lambda: loop.train_and_evaluate(more, folder),
    'eval': lambda: loop.evaluate_checkpoint(config, folder),
    'export': lambda: loop.export_checkpoint(config, folder),
  }
  before = sorted(folder.rglob('*'))
  for alone, mode, refused in (
    (True, 'train', ('train', 'eval', 'export')),
    (False, 'eval', ('train',)),
  ):
    with lock.hold(folder, mode, alone=alone):
      for name in refused:
        with pytest.raises(ConfigError, match=f'is in use .*--mode={name}'):
          calls[name]()
  exported = folder / 'export'
  assert sorted(folder.rglob('*')) in (before, sorted([*before, exported]))
  with lock.hold(folder, 'eval', alone=False):
    assert calls['eval']()['step'] == 7
