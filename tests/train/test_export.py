"""The files of an exported model: what is refused, and how they are written."""

import collections
import dataclasses
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from psa_jax.config import Config, ConfigError, RunError
from psa_jax.train import export, lock, workdir
from psa_jax.train.state import Program, TrainState

ARRAYS = {
  'params': {'layers': {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}},
  'model_state': {'mean': np.full(3, 0.5, np.float32)},
}
FLAT = {
  'params/layers/w': ARRAYS['params']['layers']['w'],
  'model_state/mean': ARRAYS['model_state']['mean'],
}
Folded = collections.namedtuple('Folded', 'config params model_state')


def program():
  """As much of one as `load` looks at."""
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  whole = TrainState(np.int32(0), **ARRAYS, opt_state=(), fault=np.int32(0))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), whole
  )
  return Program(None, None, None, abstract, Config(), 0)


def write(folder, arrays=None, metadata=None):
  arrays = FLAT if arrays is None else arrays
  metadata = export._metadata(7, arrays) if metadata is None else metadata
  save_file(arrays, folder / export.WEIGHTS, metadata=metadata)
  return folder / export.WEIGHTS


def assert_as_written(state):
  assert int(state.step) == 7
  np.testing.assert_array_equal(
    state.params['layers']['w'], FLAT['params/layers/w']
  )
  np.testing.assert_array_equal(
    state.model_state['mean'], FLAT['model_state/mean']
  )


def test_no_byte_can_change(tmp_path):
  """Every byte in turn: refused, or it meant nothing (a blank of JSON)."""
  path = write(tmp_path)
  whole = path.read_bytes()
  assert_as_written(export.load(tmp_path, program()))
  refused = 0
  for i in range(len(whole)):
    path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x01]) + whole[i + 1 :])
    try:
      state = export.load(tmp_path, program())
    except RunError as e:
      assert 'export the model again' in str(e) and '\n' not in str(e)
      refused += 1
    else:
      assert_as_written(state)
  assert refused > 0.9 * len(whole)
  path.write_bytes(whole[:-1])
  with pytest.raises(RunError, match='export the model again'):
    export.load(tmp_path, program())


@pytest.mark.parametrize('step', ['1e30', '-1', str(2**31), '9' * 5000, 'x'])
def test_a_step_that_no_run_has(tmp_path, step):
  write(tmp_path, metadata={'step': step, 'crc32': '0'})
  with pytest.raises(RunError, match='export the model again') as error:
    export.load(tmp_path, program())
  assert len(str(error.value)) < 500


def test_arrays_of_another_dtype_or_shape_are_another_model(tmp_path):
  for other in (
    {**FLAT, 'params/layers/w': FLAT['params/layers/w'].astype(np.float16)},
    {**FLAT, 'params/layers/w': FLAT['params/layers/w'].T.copy()},
    {**FLAT, 'params/more': FLAT['params/layers/w']},
    {'params/layers/w': FLAT['params/layers/w']},
  ):
    write(tmp_path, other)
    with pytest.raises(ConfigError, match='is of another model: '):
      export.load(tmp_path, program())


@pytest.fixture
def saved(tmp_path, monkeypatch):
  """Exports these arrays as they are."""

  def fold(config, params, model_state, *, step):
    return Folded(config, params, model_state)

  monkeypatch.setattr(export, 'fold', fold)

  def save(value=0.0):
    params = jax.tree.map(lambda x: jnp.asarray(x + value), ARRAYS['params'])
    state = TrainState(
      jnp.int32(7), params, ARRAYS['model_state'], (), jnp.int32(0)
    )
    return export.save(tmp_path, dataclasses.replace(Config(), name='x'), state)

  return save


def test_both_files_have_the_mode_of_the_umask_and_no_draft_is_left(saved):
  old = os.umask(0o027)
  try:
    _, folder = saved()
  finally:
    os.umask(old)
  names = {path.name for path in folder.iterdir()}
  assert names == {export.WEIGHTS, workdir.CONFIG, lock.LOCK}
  for path in folder.iterdir():
    assert path.stat().st_mode & 0o777 == 0o640
  assert_as_written(export.load(folder, program()))


def test_a_full_disk_leaves_the_model_that_was_there(saved):
  _, folder = saved()
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
  try:
    with pytest.raises(RunError, match='cannot write .*model.safetensors'):
      saved(1.0)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_model_that_is_read_is_not_replaced(saved):
  _, folder = saved()
  before = (folder / export.WEIGHTS).read_bytes()
  with lock.hold(folder, 'eval', alone=False):
    with pytest.raises(ConfigError, match='is in use'):
      saved(1.0)
  assert (folder / export.WEIGHTS).read_bytes() == before
