"""The compiled step: golden numbers, accumulation, sharding, the guard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import NormConfig
from psa_jax.train import step as step_lib
from psa_jax.train.state import TrainState
from tests.train import tiny

GOLDEN = {
  'loss/0': 5.570134162902832,
  'bits_per_byte/0': 8.036005020141602,
  'grad_norm/0': 3.0371761322021484,
  'learning_rate/0': 0.005,
  'density/0': 1.0,
  'gamma/0': 1.0,
  'fault/0': 0.0,
  'loss/1': 5.464425086975098,
  'bits_per_byte/1': 7.883498668670654,
  'grad_norm/1': 1.4840421676635742,
  'learning_rate/1': 0.01,
  'density/1': 1.0,
  'gamma/1': 5 / 6,
  'fault/1': 0.0,
}
WHY = """
One step of a tiny model on fixed text no longer gives the numbers it gave.
That is right if you changed, on purpose, how a model starts (initial values,
their random keys), what it computes, the loss or the optimiser: then say so in
the commit and update GOLDEN. It is a bug if you only moved code, made it
faster or upgraded a package.
"""


RMSNORM = NormConfig(kind='rmsnorm')


@pytest.fixture(scope='module')
def prepbn():
  return tiny.Steps(tiny.config())


@pytest.fixture(scope='module')
def rmsnorm():
  return tiny.Steps(tiny.config(RMSNORM))


@pytest.fixture(scope='module')
def halves():
  return tiny.Steps(tiny.config(accumulate=2))


def run(steps, batches, state=None):
  """States and metrics after each of `batches`."""
  state = steps.init() if state is None else state
  found = []
  for batch in batches:
    state, metrics = steps.train_step(state, batch)
    found.append(tiny.host(metrics))
  return state, found


def same(found, expected, *, rtol):
  """Compares the metrics of every step."""
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
      assert float(value) == pytest.approx(float(other[name]), rel=rtol), name


def close(left, right, *, rtol):
  """Compares trees by their relative L2 distance, leaf by leaf."""
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(tiny.host(left)),
    jax.tree.leaves(tiny.host(right)),
    strict=True,
  ):
    distance = np.linalg.norm(np.float64(a) - np.float64(b))
    scale = np.linalg.norm(np.float64(b)) + 1e-12
    assert distance <= rtol * scale, (
      f'{jax.tree_util.keystr(path)}: {distance / scale}'
    )


def test_golden_metrics_of_two_steps(prepbn):
  _, found = run(prepbn, [prepbn.batch(), prepbn.batch(first=8)])
  got = {
    f'{name}/{i}': float(value)
    for i, metrics in enumerate(found)
    for name, value in metrics.items()
  }
  assert got == pytest.approx(GOLDEN, rel=2e-4, abs=1e-6), WHY


def test_first_loss_is_that_of_a_uniform_guess(rmsnorm):
  _, (metrics,) = run(rmsnorm, [rmsnorm.batch()])
  assert metrics['loss'] == pytest.approx(np.log(256), abs=0.2)


def test_update_is_adamw_with_clipping(rmsnorm):
  """Against the textbook in float64, from the gradients of the loss itself."""
  optim = rmsnorm.config.optim
  state, batch = rmsnorm.init(), rmsnorm.batch()
  batch['weights'] = batch['weights'] * 0.3

  def mean_loss(params):
    model = rmsnorm.program.merge(params, {})
    loss = rmsnorm.task.loss(model, batch, step=0, train=True)
    return loss.total / loss.weight

  before = tiny.host(state.params)
  grads = tiny.host(jax.jit(jax.grad(mean_loss))(state.params))
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  after, (metrics,) = run(rmsnorm, [batch], state)
  assert metrics['grad_norm'] == pytest.approx(norm, rel=1e-4)
  rate = optim.learning_rate / optim.warmup_steps
  assert metrics['learning_rate'] == pytest.approx(rate)

  def expected(path, p, g):
    g = np.float64(g) * min(1, optim.clip_norm / norm)
    mean = (1 - optim.b1) * g / (1 - optim.b1)
    var = (1 - optim.b2) * g**2 / (1 - optim.b2)
    direction = mean / (np.sqrt(var) + optim.eps)
    decay = optim.weight_decay if path[-1].key != 'scale' else 0
    return p - rate * (direction + decay * p)

  assert norm > optim.clip_norm, 'the clipping is not exercised'
  close(
    after.params,
    jax.tree_util.tree_map_with_path(expected, before, grads),
    rtol=1e-4,
  )
  assert int(after.step) == 1


def test_accumulation_equals_the_whole_batch(rmsnorm):
  """Also where micro-batches do not count equally many tokens."""
  parts = tiny.Steps(tiny.config(RMSNORM, accumulate=4))
  batches = [rmsnorm.batch(), rmsnorm.batch(first=8)]
  weights = np.ones((8, 16), np.float32)
  weights[:3], weights[5, 7:] = 0, 0
  batches[0] |= rmsnorm.put({'weights': weights})
  whole, expected = run(rmsnorm, batches)
  state, found = run(parts, batches)
  same(found, expected, rtol=1e-5)
  close(state.params, whole.params, rtol=2e-5)


def test_accumulation_passes_statistics_on(prepbn, halves):
  """Two micro-batches move the running mean twice, one after the other."""
  parts, batch = halves, halves.batch()
  state, _ = run(parts, [batch])
  step = jax.jit(lambda state, rows: _statistics_after(prepbn, state, rows))
  once = prepbn.init()
  for rows in (slice(0, None, 2), slice(1, None, 2)):
    half = {name: value[rows] for name, value in batch.items()}
    once = once._replace(model_state=step(once, half))
  close(state.model_state, once.model_state, rtol=1e-5)


def _statistics_after(steps, state, batch):
  model = steps.program.merge(state.params, state.model_state)
  steps.task.loss(model, batch, step=state.step, train=True)
  return steps.program.model_state(model)


def test_statistics_move_in_training_only(prepbn):
  state = prepbn.init()
  before = tiny.host(state.model_state)
  assert jax.tree.leaves(before), 'PRepBN has no running statistics'
  loss = prepbn.eval_step(state, prepbn.batch())
  assert np.isfinite(loss.total)
  tiny.assert_identical(state.model_state, before)
  state, _ = run(prepbn, [prepbn.batch()], state)
  for old, new in zip(
    jax.tree.leaves(before), jax.tree.leaves(state.model_state), strict=True
  ):
    assert np.abs(np.asarray(new) - old).max() > 1e-4


def test_evaluation_reads_the_statistics(prepbn):
  state = prepbn.init()
  state = state._replace(step=jnp.int32(100))  # gamma is 0
  loss = float(prepbn.eval_step(state, prepbn.batch()).total)
  moved = jax.tree.map(lambda x: x + 1, state.model_state)
  other = prepbn.eval_step(state._replace(model_state=moved), prepbn.batch())
  assert abs(float(other.total) - loss) > 1e-3


@pytest.mark.parametrize(
  ('mesh', 'accumulate'),
  [({'data': 4, 'tensor': 2}, 2), ({'fsdp': 4}, 1)],
  ids=['data4-tensor2-accumulate2', 'fsdp4'],
)
def test_sharded_equals_one_device(prepbn, halves, mesh, accumulate):
  one = prepbn if accumulate == 1 else halves
  many = tiny.Steps(tiny.config(accumulate=accumulate, **mesh))
  state = many.init()
  tiny.assert_identical(state, one.init())
  expected_state, expected = run(one, [one.batch(), one.batch(first=8)])
  state, found = run(many, [many.batch(), many.batch(first=8)], state)
  same(found, expected, rtol=1e-4)
  close(state.model_state, expected_state.model_state, rtol=1e-4)
  close(state.params, expected_state.params, rtol=1e-3)
  wq = state.params['layers']['attention']['wq']
  shape = wq.addressable_shards[0].data.shape
  assert shape == (2, 16 // mesh.get('fsdp', 1), 4 // mesh.get('tensor', 1), 4)
  assert moments(state)['layers']['attention']['wq'].sharding == wq.sharding


def moments(state):
  return next(s.mu for s in state.opt_state if hasattr(s, 'mu'))


def test_a_loss_that_is_not_finite_changes_nothing(prepbn):
  state, _ = run(prepbn, [prepbn.batch()])
  good = tiny.host(state)
  bad = prepbn.batch()
  bad['weights'] = bad['weights'] * np.inf
  state, (metrics,) = run(prepbn, [bad], state)
  assert step_lib.FAULTS[int(metrics['fault']) - 1] == 'loss'
  tiny.assert_identical(state, good._replace(fault=np.int32(1)))
  # The next step, already dispatched when the fault is seen, changes nothing.
  state, (metrics,) = run(prepbn, [prepbn.batch(first=8)], state)
  assert int(metrics['fault']) == 1 and np.isfinite(metrics['loss'])
  tiny.assert_identical(state, good._replace(fault=np.int32(1)))


def test_parameters_that_overflow_are_refused(rmsnorm):
  state = rmsnorm.init()
  moments(state)['embedding'] = jnp.full((256, 16), 3e38)
  good = tiny.host(state)
  state, (metrics,) = run(rmsnorm, [rmsnorm.batch()], state)
  assert step_lib.FAULTS[int(metrics['fault']) - 1] == 'parameters'
  tiny.assert_identical(state.params, good.params)


@pytest.mark.parametrize('what', step_lib.FAULTS)
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_every_check_of_the_guard(what, value):
  one, other = np.ones(2, np.float32), np.zeros(2, np.float32)
  bad, counter = np.array([0, value], np.float32), np.arange(3, dtype=np.int32)
  none = np.int32(0)
  old = TrainState(np.int32(7), {'w': one}, {'m': one, 'n': counter}, (), none)
  new = old._replace(step=np.int32(8), params={'w': other})
  metrics = {'loss': np.float32(1), 'grad_norm': np.float32(1)}
  tiny.assert_identical(step_lib._guard(old, new, metrics), new)
  if what in metrics:
    metrics[what] = np.float32(value)
  elif what == 'parameters':
    new = new._replace(params={'w': bad})
  else:
    new = new._replace(model_state={'m': bad, 'n': counter})
  kept = step_lib._guard(old, new, metrics)
  assert step_lib.FAULTS[int(kept.fault) - 1] == what
  tiny.assert_identical(kept._replace(fault=none), old)


def test_a_batch_without_a_counting_token_has_no_gradient(rmsnorm):
  batch = rmsnorm.batch()
  batch['weights'] = batch['weights'] * 0
  state, (metrics,) = run(rmsnorm, [batch])
  assert metrics['loss'] == 0 and metrics['fault'] == 0
  assert not any(np.any(x) for x in jax.tree.leaves(tiny.host(moments(state))))


def test_bf16_parameters_have_f32_moments_and_stay_bf16():
  config = tiny.config(RMSNORM)
  model = dataclasses.replace(
    config.model, param_dtype='bfloat16', compute_dtype='bfloat16'
  )
  steps = tiny.Steps(dataclasses.replace(config, model=model))
  abstract = steps.program.abstract
  with jax.set_mesh(steps.mesh):
    state, metrics = jax.eval_shape(
      steps.train_step.jitted, abstract, steps.batch()
    )
  assert {x.dtype.name for x in jax.tree.leaves(abstract.params)} == {
    'bfloat16'
  }
  assert {x.dtype.name for x in jax.tree.leaves(moments(abstract))} == {
    'float32'
  }
  assert metrics['loss'].dtype == np.float32
  for before, after in zip(
    jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True
  ):
    assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_one_compilation_over_a_whole_schedule(prepbn):
  """Gamma, learning rate and the step itself are traced."""
  steps = prepbn
  steps.train_step.jitted.clear_cache()
  state, found = run(steps, [steps.batch(first=i) for i in range(9)])
  assert steps.train_step.jitted._cache_size() == 1
  gammas = [float(m['gamma']) for m in found]
  assert gammas == pytest.approx([max(0, 1 - i / 6) for i in range(9)])
  assert int(state.step) == 9
