"""Saving and restoring, and every way in which a checkpoint can be broken."""

import collections
import errno
import os
import pathlib
import resource
import shutil
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from psa_jax import sharding
from psa_jax.config import ConfigError, MeshConfig, RunError
from psa_jax.config.errors import StalledError
from psa_jax.train import checkpoint as lib
from psa_jax.train.digest import DIGEST
from psa_jax.train.state import TrainState
from tests.train import tiny

pytestmark = pytest.mark.tier('default')


def state(seed, size=64):
  """Random numbers do not compress, so a flipped bit hits an array."""
  rng = np.random.default_rng(seed)
  return TrainState(
    step=jnp.int32(seed),
    params={'a': jnp.asarray(rng.normal(size=(size, size)), jnp.float32)},
    model_state={'b': jnp.asarray(rng.normal(size=size), jnp.bfloat16)},
    opt_state=({'c': jnp.int32(7)}, ()),
    fault=jnp.int32(0),
  )


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


@pytest.fixture
def said():
  return []


@pytest.fixture
def opened(tmp_path, said):
  """Opens the folder; every manager is closed at the end of the test."""
  managers = []

  def open_(**options):
    options = {'keep': 2, 'say': said.append, **options}
    managers.append(lib.Checkpoints(tmp_path / 'checkpoints', **options))
    return managers[-1]

  yield open_
  for manager in managers:
    manager.close()


@pytest.fixture
def two(opened):
  """A folder with the checkpoints of steps 1 and 2."""
  checkpoints = opened()
  for step in (1, 2):
    checkpoints.save(step, state(step), {'place': step}, {'seconds': 1.5})
  checkpoints.wait()
  return checkpoints


def files(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_a_state_comes_back_bit_for_bit(two, opened):
  found = opened().restore_latest(abstract(state(0)))
  tiny.assert_identical(found.state, state(2))
  assert isinstance(found.state, TrainState)
  assert (found.step, found.data) == (2, {'place': 2})
  assert found.meta == {'seconds': 1.5, 'step': 2}


def test_there_may_be_no_checkpoint(opened):
  assert opened().restore_latest(abstract(state(0))) is None
  assert opened(read_only=True).restore_latest(abstract(state(0))) is None


def test_the_newest_stay(two):
  two.save(5, state(5), {}, {})
  two.wait()
  assert two.steps() == [2, 5]


def test_a_state_may_be_donated_while_it_is_written(opened):
  checkpoints = opened()
  begin = state(3, size=1024)
  expected = tiny.host(begin)
  overwrite = jax.jit(
    lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0
  )
  overwrite.lower(begin).compile()
  checkpoints.save(3, begin, {}, {})
  for _ in range(20):
    begin = overwrite(begin)
  checkpoints.wait()
  found = checkpoints.restore_latest(abstract(begin))
  tiny.assert_identical(found.state, expected)


def test_a_state_comes_back_onto_another_mesh(two, opened):
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  target = abstract(state(0))
  where = NamedSharding(mesh, P('fsdp', 'tensor'))
  target.params['a'] = jax.ShapeDtypeStruct((64, 64), 'float32', sharding=where)
  found = opened().restore_latest(target)
  tiny.assert_identical(found.state, state(2))
  assert found.state.params['a'].sharding == where


def largest(folder):
  """The file that holds the arrays."""
  return max((p for p in folder.rglob('*') if p.is_file()), key=os.path.getsize)


def delete(path):
  path.unlink()


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


DAMAGE = {
  'arrays deleted': lambda f: delete(largest(f)),
  'arrays truncated': lambda f: truncate(largest(f)),
  'arrays flipped': lambda f: flip(largest(f)),
  'tree truncated': lambda f: truncate(f / 'state' / '_METADATA'),
  'meta deleted': lambda f: delete(f / 'meta' / 'metadata'),
  'meta flipped': lambda f: flip(f / 'meta' / 'metadata'),
  'data truncated': lambda f: truncate(f / 'data' / 'metadata'),
  'state deleted': lambda f: shutil.rmtree(f / 'state'),
  'digest deleted': lambda f: delete(f / DIGEST),
  'digest truncated': lambda f: truncate(f / DIGEST),
  'digest empty': lambda f: (f / DIGEST).write_text('{}'),
  'digest of nothing': lambda f: (f / DIGEST).write_text('{"a": 1}'),
  'a file too many': lambda f: (f / 'state' / 'more').write_text('x'),
  'empty': lambda f: [shutil.rmtree(f), f.mkdir()],
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_broken_checkpoint_falls_back_to_the_one_before(
  two, opened, said, damage, capfd
):
  DAMAGE[damage](two.path / '2')
  broken = files(two.path / '2')
  capfd.readouterr()
  checkpoints = opened()
  found = checkpoints.restore_latest(abstract(state(0)))
  tiny.assert_identical(found.state, state(1))
  assert found.step == 1 and found.data == {'place': 1}
  first, second = said
  assert 'cannot read the checkpoint of step 2' in first
  assert '2.corrupt' in second
  assert '\n' not in first + second
  assert ''.join(capfd.readouterr()) == '', 'the reader threads spoke up'
  assert files(two.path / '2.corrupt') == broken
  # The run comes by step 2 again.
  checkpoints.save(2, state(20), {}, {})
  checkpoints.wait()
  found = opened().restore_latest(abstract(state(0)))
  tiny.assert_identical(found.state, state(20))


def test_a_reader_leaves_a_broken_checkpoint_where_it_is(two, opened):
  flip(largest(two.path / '2'))
  before = files(two.path)
  found = opened(read_only=True).restore_latest(abstract(state(0)))
  assert found.step == 1
  assert files(two.path) == before


def test_nothing_is_deleted_if_no_checkpoint_can_be_read(two, opened):
  for step in ('1', '2'):
    truncate(largest(two.path / step))
  before = files(two.path)
  with pytest.raises(RunError, match=r'no checkpoint in .*steps 2, 1'):
    opened().restore_latest(abstract(state(0)))
  assert files(two.path) == before


def test_a_state_of_another_shape_is_an_error_not_a_restart(two, opened):
  with pytest.raises(RunError, match='no checkpoint .* can be read') as error:
    opened().restore_latest(abstract(state(0, size=32)))
  assert '\n' not in str(error.value)


def test_what_a_killed_save_left_is_cleared_away(two, opened, said):
  half = two.path / '3.orbax-checkpoint-tmp'
  shutil.copytree(two.path / '2', half)
  checkpoints = opened()
  assert 'half-written checkpoint of step 3' in said[0]
  assert not half.exists()
  assert checkpoints.restore_latest(abstract(state(0))).step == 2


def test_a_full_disk_leaves_the_earlier_checkpoints(two, opened, monkeypatch):
  before = files(two.path)
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(9, 9, 100))
  with pytest.raises(
    RunError, match=r'step 3: it takes .* MiB left; the last good one is step 2'
  ):
    two.save(3, state(3), {}, {})
  assert files(two.path) == before


def test_a_write_that_fails_leaves_the_earlier_checkpoints(two, opened):
  """The file system itself refuses, in a thread, after `save` returned."""
  before = files(two.path)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(
      RunError, match='step 3: file too large; the last good one is step 2'
    ) as error:
      two.save(3, state(3, size=512), {}, {})
      while True:  # what the loop does at every step
        two.poll()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(error.value)
  assert files(two.path) == before
  two.save(3, state(3, size=512), {}, {})
  two.wait()
  assert two.steps() == [2, 3]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(RunError, match='cannot use the checkpoint folder'):
    lib.Checkpoints(tmp_path / 'file' / 'checkpoints')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_read_only_folder_is_named(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(RunError, match='Permission denied'):
    lib.Checkpoints(tmp_path / 'checkpoints')


def test_an_empty_field_is_not_written_so_older_files_can_be_read(opened):
  """Files from before the controller have no such field."""
  fields = 'step params model_state opt_state fault'
  Before = collections.namedtuple('Before', fields)  # noqa: N806
  old = Before(*state(3)[:5])
  checkpoints = opened()
  checkpoints.save(3, old, {}, {})
  checkpoints.wait()
  found = opened().restore_latest(abstract(state(0)))
  tiny.assert_identical(found.state, state(3))
  assert found.state.controller == ()


def test_a_state_with_another_field_is_named(two, opened, said):
  known = state(0)._replace(controller=(jnp.float32(1),))
  with pytest.raises(RunError, match='controller is missing from it'):
    opened().restore_latest(abstract(known))
  checkpoints = opened()
  checkpoints.save(7, known, {}, {})
  checkpoints.wait()
  with pytest.raises(RunError, match='controller is in it, but not'):
    target = abstract(state(0))
    opened(keep=1).restore_latest(target._replace(params={}))


def test_arrays_are_read_without_knowing_them(two, opened):
  found = opened(read_only=True).read_arrays()
  tiny.assert_identical(found['params'], tiny.host(state(2).params))
  assert found['step'] == 2
  for path in (two.path / '2' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(RunError, match='cannot read the checkpoint of step 2'):
    opened(read_only=True).read_arrays()


def test_arrays_of_a_folder_without_checkpoints(opened):
  opened()
  assert opened(read_only=True).read_arrays() is None


def test_what_cannot_be_read_is_refused_and_stays(two, opened, monkeypatch):
  """Permissions and failing disks say nothing about the files."""
  before = files(two.path)
  read = pathlib.Path.open

  def forbidden(self, *args, **kwargs):
    if self == largest(two.path / '2'):
      raise PermissionError(errno.EACCES, 'Permission denied', str(self))
    return read(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'open', forbidden)
    for found in (opened(), opened(read_only=True)):
      with pytest.raises(RunError, match='step 2 in .*: Permission denied; no'):
        found.restore_latest(abstract(state(0)))
      with pytest.raises(RunError, match='Permission denied'):
        found.read_arrays()
  assert files(two.path) == before
  assert opened().restore_latest(abstract(state(0))).step == 2


def test_other_names_are_no_checkpoints(two, opened, said):
  for name in ('007', '08', '+9', '\u0663', '10.corrupt', 'x'):
    shutil.copytree(two.path / '2', two.path / name)
  (two.path / '11').write_text('a file')
  checkpoints = opened()
  assert checkpoints.steps() == [1, 2] and said == []
  assert checkpoints.restore_latest(abstract(state(0))).step == 2
  checkpoints.save(7, state(7), {}, {})
  checkpoints.wait()
  found = opened().restore_latest(abstract(state(0)))
  tiny.assert_identical(found.state, state(7))


def test_what_killed_saves_left_under_any_name_is_cleared_away(two, opened):
  for name in ('3.orbax-checkpoint-tmp-12', 'x.orbax-checkpoint-tmp'):
    (two.path / name / 'state').mkdir(parents=True)
  assert opened(read_only=True).steps() == [1, 2]
  assert opened().restore_latest(abstract(state(0))).step == 2
  assert sorted(path.name for path in two.path.iterdir()) == ['1', '2']


def save(checkpoints, *steps):
  for step in steps:
    checkpoints.save(step, state(step), {}, {})
  checkpoints.wait()


def test_the_last_good_one_stays_until_a_later_one_is_good(opened):
  checkpoints = opened(keep=1)
  save(checkpoints, 1)
  checkpoints.judge(1, good=True)
  save(checkpoints, 2)
  assert checkpoints.steps() == [1, 2] and checkpoints.last_good() == 1
  for step in (2, 3, 4):  # a state that is blowing up
    checkpoints.judge(step, good=False)
    save(checkpoints, step + 1)
  assert checkpoints.steps() == [1, 5] and checkpoints.last_good() == 1
  # Killed there, the next process does not know, and takes the oldest for it.
  again = opened(keep=1)
  again.judge(5, good=False)
  save(again, 6)
  assert again.steps() == [1, 6] and again.last_good() == 1
  again.judge(6, good=True)
  again.wait()
  assert again.steps() == [6] and again.last_good() == 6


def test_a_step_is_chosen_and_later_ones_are_set_aside(two, opened, said):
  checkpoints = opened()
  found = checkpoints.restore(1, abstract(state(0)))
  tiny.assert_identical(found.state, state(1))
  with pytest.raises(ConfigError, match=r'--resume_from=3: .*there: 1, 2;'):
    checkpoints.restore(3, abstract(state(0)))
  for copy in ('2.aside', '2.aside1'):
    checkpoints.set_aside([2], 'aside')
    assert (two.path / copy).is_dir() and copy in said[-1]
    save(checkpoints, 2)
  flip(largest(two.path / '1'))
  with pytest.raises(RunError, match='step 1 in .* was altered'):
    checkpoints.restore(1, abstract(state(0)))
  assert (two.path / '1').is_dir()


def test_a_folder_that_turns_read_only_is_one_line(two, monkeypatch, capfd):
  def refuse(**options):
    raise OSError(errno.EROFS, 'Read-only file system')

  before = files(two.path)
  with monkeypatch.context() as patch:
    patch.setattr(tempfile, 'TemporaryFile', refuse)
    with pytest.raises(RunError, match='step 3: read-only file system; the la'):
      two.save(3, state(3), {}, {})
  assert files(two.path) == before
  assert ''.join(capfd.readouterr()) == ''


def test_threads_that_wait_for_ever_are_given_up(two, monkeypatch):
  """As Orbax's do where one of them died; those that write have their time."""
  monkeypatch.setattr(lib, 'STALL_SECONDS', 0.2)
  monkeypatch.setattr(lib, '_LOOK_SECONDS', 0.05)
  two.save(3, state(3), {}, {})
  done, wait = threading.Event(), two._manager.wait_until_finished
  monkeypatch.setattr(two._manager, 'wait_until_finished', done.wait)
  half = two.path / '4.orbax-checkpoint-tmp'
  half.mkdir()

  def write():
    for i in range(10):
      (half / str(i)).write_text('x')
      time.sleep(0.05)

  threading.Thread(target=write).start()
  began = time.monotonic()
  with pytest.raises(StalledError, match='step 3: nothing was written'):
    two.wait()
  assert time.monotonic() - began > 0.5
  two.close()
  done.set()
  wait()
