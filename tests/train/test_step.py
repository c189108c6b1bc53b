"""The compiled step: golden numbers, accumulation, sharding, the guard."""

import dataclasses

import jax
import numpy as np
import pytest

from psa_jax.attention.context import AttentionContext
from psa_jax.train import step as step_lib
from tests.train import tiny

pytestmark = pytest.mark.tier('default')

GOLDEN = {
  'loss/0': 5.570199012756348,
  'bits_per_byte/0': 8.03609848022461,
  'grad_norm/0': 3.0364112854003906,
  'learning_rate/0': 0.005,
  'density/0': 1.0,
  'gamma/0': 1.0,
  'fault/0': 0.0,
  'loss/1': 5.464451313018799,
  'bits_per_byte/1': 7.8835368156433105,
  'grad_norm/1': 1.4843249320983887,
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


@pytest.fixture(scope='module')
def steps():
  """PRepBN; at step 0 gamma is 1, so it is RMSNorm that gathers statistics."""
  return tiny.Steps(tiny.config())


@pytest.fixture(scope='module')
def halves():
  """The same with two micro-batches a step."""
  return tiny.Steps(tiny.config(accumulate=2))


def run(steps, batches, state=None):
  """States and metrics after each of `batches`."""
  state = steps.init() if state is None else state
  found = []
  for batch in batches:
    state, metrics = steps.train_step(state, batch)
    found.append(tiny.host(metrics))
  return state, found


def weighted(steps, weights):
  """A batch in which positions count as `weights` say."""
  weights = np.broadcast_to(np.float32(weights), (8, 16))
  return steps.batch() | steps.put({'weights': weights})


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


def test_golden_metrics_of_two_steps(steps):
  _, found = run(steps, [steps.batch(), steps.batch(first=8)])
  got = {
    f'{name}/{i}': float(value)
    for i, metrics in enumerate(found)
    for name, value in metrics.items()
  }
  assert got == pytest.approx(GOLDEN, rel=2e-4, abs=1e-6), WHY


def test_first_loss_is_that_of_a_uniform_guess(steps):
  _, (metrics,) = run(steps, [steps.batch()])
  assert metrics['loss'] == pytest.approx(np.log(256), abs=0.2)


def test_update_is_adamw_with_clipping(steps):
  """Against the textbook in float64, from the gradients of the loss itself."""
  optim = steps.config.optim
  state, batch = steps.init(), weighted(steps, 0.3)

  def mean_loss(params):
    model = steps.program.merge(params, state.model_state)
    loss = steps.task.loss(model, batch, AttentionContext(step=0, train=True))
    return loss.total / loss.weight

  before = tiny.host(state.params)
  grads = tiny.host(jax.jit(jax.grad(mean_loss))(state.params))
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  after, (metrics,) = run(steps, [batch], state)
  assert metrics['grad_norm'] == pytest.approx(norm, rel=1e-4)
  rate = optim.learning_rate / optim.warmup_steps
  assert metrics['learning_rate'] == pytest.approx(rate)

  def expected(path, p, g):
    g = np.float64(g) * min(1, optim.clip_norm / norm)
    mean = (1 - optim.b1) * g / (1 - optim.b1)
    var = (1 - optim.b2) * g**2 / (1 - optim.b2)
    direction = mean / (np.sqrt(var) + optim.eps)
    matrix = path[-1].key.startswith(('w', 'embedding'))
    decay = optim.weight_decay if matrix else 0
    return p - rate * (direction + decay * p)

  assert norm > optim.clip_norm, 'the clipping is not exercised'
  close(
    after.params,
    jax.tree_util.tree_map_with_path(expected, before, grads),
    rtol=1e-4,
  )
  assert int(after.step) == 1


def test_accumulation_equals_the_whole_batch(steps, halves):
  """Also where the micro-batches do not count equally many tokens."""
  weights = np.ones((8, 16))
  weights[::2], weights[5, 7:] = 0, 0
  batch = weighted(steps, weights)
  whole, expected = run(steps, [batch])
  state, found = run(halves, [batch])
  same(found, expected, rtol=1e-5)
  close(state.params, whole.params, rtol=2e-5)
  close(state.opt_state, whole.opt_state, rtol=2e-5)


def test_accumulation_passes_statistics_on(steps, halves):
  """Two micro-batches move the running mean twice, one after the other."""
  batch = halves.batch()
  state, _ = run(halves, [batch])
  after = jax.jit(lambda state, rows: _statistics_after(steps, state, rows))
  once = steps.init()
  for rows in (slice(0, None, 2), slice(1, None, 2)):
    half = {name: value[rows] for name, value in batch.items()}
    once = once._replace(model_state=after(once, half))
  close(state.model_state, once.model_state, rtol=1e-5)


def _statistics_after(steps, state, batch):
  model = steps.program.merge(state.params, state.model_state)
  steps.task.loss(model, batch, AttentionContext(step=state.step, train=True))
  return steps.program.model_state(model)


def test_statistics_move_in_training_only(steps):
  state = steps.init()
  before = tiny.host(state.model_state)
  assert jax.tree.leaves(before), 'PRepBN has no running statistics'
  loss = steps.eval_step(state, steps.batch(rows=3, seq_len=32))
  assert np.isfinite(loss.total)
  tiny.assert_identical(state.model_state, before)
  state, _ = run(steps, [steps.batch()], state)
  for old, new in zip(
    jax.tree.leaves(before), jax.tree.leaves(state.model_state), strict=True
  ):
    assert np.abs(np.asarray(new) - old).max() > 1e-4


def test_evaluation_reads_the_statistics(steps):
  state = steps.init()
  state = state._replace(step=like(state.step, 100))  # gamma is 0
  batch = steps.batch(rows=3, seq_len=32)
  loss = float(steps.eval_step(state, batch).total)
  moved = jax.tree.map(lambda x: like(x, x + 1), state.model_state)
  other = steps.eval_step(state._replace(model_state=moved), batch)
  assert abs(float(other.total) - loss) > 1e-3


@pytest.mark.parametrize(
  ('mesh', 'accumulate'),
  [({'data': 4, 'tensor': 2}, 2), ({'fsdp': 4}, 1)],
  ids=['data4-tensor2-accumulate2', 'fsdp4'],
)
def test_sharded_equals_one_device(steps, halves, mesh, accumulate):
  one = steps if accumulate == 1 else halves
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


def like(array, value):
  """`value` where `array` lives, so that no step compiles again."""
  return jax.device_put(np.asarray(value, array.dtype), array.sharding)


def moments(state):
  return next(s.mu for s in state.opt_state if hasattr(s, 'mu'))


def test_a_loss_that_is_not_finite_changes_nothing(steps):
  state, _ = run(steps, [steps.batch()])
  good = tiny.host(state)
  bad = weighted(steps, np.inf)
  state, (metrics,) = run(steps, [bad], state)
  assert step_lib.FAULTS[int(metrics['fault']) - 1] == 'loss'
  tiny.assert_identical(state, good._replace(fault=np.int32(1)))
  # The next step, already dispatched when the fault is seen, changes nothing.
  state, (metrics,) = run(steps, [steps.batch(first=8)], state)
  assert int(metrics['fault']) == 1 and np.isfinite(metrics['loss'])
  tiny.assert_identical(state, good._replace(fault=np.int32(1)))


def test_parameters_that_overflow_are_refused(steps):
  state = steps.init()
  mean = moments(state)['embedding']
  moments(state)['embedding'] = like(mean, np.full(mean.shape, 3e38))
  good = tiny.host(state)
  state, (metrics,) = run(steps, [steps.batch()], state)
  assert step_lib.FAULTS[int(metrics['fault']) - 1] == 'parameters'
  tiny.assert_identical(state.params, good.params)


@pytest.mark.parametrize('what', step_lib.FAULTS)
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_every_check_of_an_update(what, value):
  good, bad = np.ones(2, np.float32), np.array([0, value], np.float32)
  metrics = {'loss': np.float32(1), 'grad_norm': np.float32(1)}
  params, statistics = {'w': good}, {'m': good, 'count': np.arange(3)}
  moments = {'v': good}
  assert step_lib._fault(metrics, params, statistics, moments) == 0
  if what in metrics:
    metrics[what] = np.float32(value)
  elif what == 'parameters':
    params['w'] = bad
  elif what == 'optimizer state':
    moments['v'] = bad
  else:
    statistics['m'] = bad
  found = step_lib._fault(metrics, params, statistics, moments)
  assert step_lib.FAULTS[int(found) - 1] == what


def test_a_batch_without_a_counting_token_has_no_gradient(steps):
  batch = weighted(steps, 0)
  state, (metrics,) = run(steps, [batch])
  assert metrics['loss'] == 0 and metrics['fault'] == 0
  assert not any(np.any(x) for x in jax.tree.leaves(tiny.host(moments(state))))


def test_bf16_parameters_have_f32_moments_and_stay_bf16():
  config = tiny.config()
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


def test_one_compilation_over_a_whole_schedule(steps):
  """Gamma, learning rate and the step itself are traced."""
  steps.train_step.jitted.clear_cache()
  state, found = run(steps, [steps.batch(first=i) for i in range(9)])
  assert steps.train_step.jitted._cache_size() == 1
  gammas = [float(m['gamma']) for m in found]
  assert gammas == pytest.approx([max(0, 1 - i / 6) for i in range(9)])
  assert int(state.step) == 9
