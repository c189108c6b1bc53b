"""Saving and restoring, and every way in which a checkpoint can be broken."""

import collections
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from psa_jax import sharding
from psa_jax.config import MeshConfig, RunError
from psa_jax.train import checkpoint as lib
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
  'digest deleted': lambda f: delete(f / lib.DIGEST),
  'digest truncated': lambda f: truncate(f / lib.DIGEST),
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
