"""The controller on made-up plants, in the step, and in a killed run."""

import dataclasses
import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import attend, registry
from psa_jax.attention.context import AttentionContext
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  ControllerConfig,
  apply_overrides,
)
from psa_jax.train import controller, loop, metrics
from tests.train import tiny
from tests.train.runs import assert_same_run, interrupted

MASS = ControllerConfig('mass', target=0.9, tolerance=0.02, every=4)
LOSS = ControllerConfig('loss', tolerance=0.05, every=4)


@functools.partial(jax.jit, static_argnames=('rules', 'plant', 'steps'))
def simulate(rules, plant, steps, seed=0):
  """Keep ratio and observed value at every step of a closed loop."""

  def one(state, step):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), step))
    seen = plant(state.keep, step, noise)
    after = controller.observe(
      rules, state, step=step, retained_mass=seen, loss=seen
    )
    return after, (state.keep, seen)

  state = controller.init(rules)
  _, (keep, seen) = jax.lax.scan(one, state, jnp.arange(steps))
  return keep, seen


def mass_curve(keep, step, noise):
  """Retained mass: 0.9 at a keep of 0.42, 0.92 at one of 0.48."""
  del step
  return 1 - 0.3 * (1 - keep) ** 2 + 0.002 * noise


def cliff(keep, step, noise):
  """No keep ratio lands inside the band."""
  del step, noise
  return jnp.where(keep > 0.4, 1.0, 0.5)


def shocked_curve(keep, step, noise):
  """From step 200 on the same keep ratio retains much less."""
  lost = jnp.where(step < 200, 0.3, 1.2)
  return 1 - lost * (1 - keep) ** 2 + 0.002 * noise


def loss_curve(keep, step, noise):
  """A loss that falls with time, and rises where too little is read."""
  missing = jnp.maximum(0.3 - keep, 0)
  return 2 + jnp.exp(-step / 100) + 20 * missing**2 + 0.002 * noise


def shocked_loss(keep, step, noise):
  """For 40 steps, reading less than 0.7 costs a nat."""
  bad = (step >= 300) & (step < 340) & (keep < 0.7)
  return loss_curve(keep, step, noise) + jnp.where(bad, 1.0, 0.0)


def test_it_lowers_the_budget_and_settles_in_the_band():
  keep, seen = (np.asarray(x) for x in simulate(MASS, mass_curve, 400))
  assert keep[0] == 1
  assert 0.40 < keep[200:].min() and keep[200:].max() < 0.52
  assert len(np.unique(keep[300:])) == 1, 'it still moves'
  assert 0.89 < seen[300:].mean() < 0.93


def test_it_learns_to_approach_a_cliff_slowly():
  """It looks over the edge again and again, but less often and less far."""
  keep, seen = (np.asarray(x) for x in simulate(MASS, cliff, 1200))
  late = keep[1000:]
  assert 0.38 < late.min() and late.max() < 0.5
  assert 0 < np.mean(seen[1000:] < 0.9) < 0.1


def test_it_backs_off_on_a_shock_within_a_few_looks():
  keep, seen = (np.asarray(x) for x in simulate(MASS, shocked_curve, 500))
  before = keep[199]
  assert before < 0.52
  assert seen[200] < 0.75
  assert keep[216] > 1.3 * before
  assert seen[240] > 0.88 and seen[400:].min() > 0.88
  assert keep[400:].max() < 0.9, 'it came down again as far as it may'


def test_the_loss_may_be_watched_instead():
  keep, _ = (np.asarray(x) for x in simulate(LOSS, loss_curve, 400))
  assert keep[0] == 1 and 0.15 < keep[-100:].mean() < 0.35


def test_a_worse_loss_backs_off_too():
  keep, _ = (np.asarray(x) for x in simulate(LOSS, shocked_loss, 420))
  assert keep[299] < 0.35
  assert keep[345] > 1.4 * keep[299]


def test_bounds():
  """Nothing is too little: the floor. Everything is: dense for ever."""
  floor = dataclasses.replace(MASS, floor=0.3)
  keep, _ = simulate(floor, lambda keep, step, noise: 1.0 + 0 * keep, 200)
  assert float(keep.min()) == np.float32(0.3) == float(keep[-1])
  keep, _ = simulate(MASS, lambda keep, step, noise: 0 * keep, 50)
  assert (np.asarray(keep) == 1).all()


def test_it_waits_for_its_first_step_and_between_looks():
  late = dataclasses.replace(MASS, begin=10, every=5)
  keep, _ = simulate(late, lambda keep, step, noise: 1.0 + 0 * keep, 30)
  moves = np.flatnonzero(np.diff(np.asarray(keep))) + 1
  assert moves.tolist() == [15, 20, 25]


def test_after_backing_off_it_holds():
  def dip(keep, step, noise):
    return jnp.where((step >= 12) & (step < 16), 0.5, 1.0) + 0 * keep

  rules = dataclasses.replace(MASS, hold=3)
  keep = np.asarray(simulate(rules, dip, 48)[0])
  looks = keep[::4]  # the value between two looks
  up = int(np.argmax(np.diff(looks) > 0)) + 1
  assert (looks[up : up + 4] == looks[up]).all()
  assert looks[up + 4] < looks[up]
  # And the next stride is about half as long.
  stride = np.log(looks[up + 3] / looks[up + 4])
  assert stride < 0.6 * -np.log(rules.lower)


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'model.attention.name': 'dense'}, 'attention dense has no budget'),
    ({'model.attention.psa.budget': 'mass'}, 'train.controller sets a ratio'),
    ({'model.attention.psa.keep.init': 0.5}, 'psa.keep is not read'),
    ({'train.controller.target': 0.99}, 'no more than a mass of 1'),
    ({'train.controller.lower': 1.0}, 'it must be in (0, 1)'),
    ({'train.controller.back_off': 1.0}, 'above 1'),
    ({'model.attention.name': 'dsa'}, 'dsa.budget is tokens'),
  ],
)
def test_what_cannot_be_controlled_is_refused(changes, text):
  fine = {'train.controller.kind': 'mass', 'model.attention.name': 'psa'}
  apply_overrides(tiny.config(), fine.items())
  with pytest.raises(ConfigError) as error:
    apply_overrides(tiny.config(), {**fine, **changes}.items())
  assert text in str(error.value)


def test_only_mechanisms_with_a_budget_take_one():
  x = jnp.ones((1, 8, 1, 8))
  context = AttentionContext(budget=jnp.float32(0.5))
  for name in registry.names():
    if not registry.get(name).takes_budget:
      with pytest.raises(ConfigError, match=f'{name} has no budget.*psa'):
        attend(x, x, x, config=AttentionConfig(name), context=context)
  out = attend(x, x, x, config=AttentionConfig('psa'), context=context)
  assert out.aux['budget'] == 0.5


@pytest.fixture(scope='module')
def steps():
  return tiny.Steps(tiny.config_controller())


@pytest.mark.tier('default')
def test_in_training_density_falls_and_the_mass_stays_above_the_target(steps):
  """One program for every budget; what is logged is what was used."""
  state, found = steps.init(), []
  for i in range(24):
    batch = steps.batch(rows=4, seq_len=64, first=i % 8)
    before = float(state.controller.keep)
    state, logged = steps.train_step(state, batch)
    logged = {k: float(v) for k, v in logged.items()}
    assert logged['budget'] == before
    found.append(logged)
  assert steps.train_step.jitted._cache_size() == 1
  density = [x['density'] for x in found]
  mass = [x['retained_mass'] for x in found]
  target = steps.config.train.controller.target
  assert density[0] == 1 and max(density[-8:]) < 0.75
  assert np.mean(mass[-8:]) > target - 0.02
  assert min(mass) > target - 0.15


@pytest.mark.tier('default')
def test_a_step_that_is_refused_teaches_nothing(steps):
  state = steps.init()
  batch = steps.batch(rows=4, seq_len=64)
  weights = np.full((4, 64), np.inf, np.float32)
  state, logged = steps.train_step(
    state, batch | steps.put({'weights': weights})
  )
  assert logged['fault'] > 0
  first = controller.init(steps.config.train.controller)
  tiny.assert_identical(state.controller, first)


@pytest.mark.tier('default')
def test_evaluation_reads_what_the_controller_allows(steps):
  state = steps.init()
  batch = steps.batch(rows=4, seq_len=64)
  assert steps.eval_step(state, batch).means['density'] == 1
  low = state.controller._replace(
    keep=jax.device_put(np.float32(0.2), state.controller.keep.sharding)
  )
  means = steps.eval_step(state._replace(controller=low), batch).means
  assert means['budget'] == np.float32(0.2) and means['density'] < 0.7


@pytest.mark.tier('default')
def test_kill_9_and_resume_equals_a_run_that_was_not_killed(
  tmp_path_factory, capsys
):
  """The controller's state is in the checkpoint, bit for bit."""
  text, whole, killed = (
    tmp_path_factory.mktemp(name) for name in ('text', 'whole', 'killed')
  )
  config = tiny.config_controller(source=tiny.write_text(text))
  loop.train_and_evaluate(config, whole)
  code, output = interrupted(
    killed, text, signal.SIGKILL, 4, config='config_controller'
  )
  assert code == -signal.SIGKILL, output
  loop.train_and_evaluate(config, killed)
  assert 'going on from step' in capsys.readouterr().out
  assert_same_run(config, whole, killed)
  budgets = [
    row['budget']
    for row in metrics.read_rows(whole / metrics.METRICS)
    if row['kind'] == 'train'
  ]
  assert budgets[0] == 1 and budgets[-1] < 0.6
