"""What a mechanism adds to the training loss, and a model that is frozen.

The mechanism is dsa, whose indexer has a loss of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax import tasks
from psa_jax.attention.context import AttentionContext
from psa_jax.train import step as step_lib
from tests.train import tiny

pytestmark = pytest.mark.tier('default')


@pytest.fixture(scope='module')
def steps():
  return tiny.Steps(tiny.config_dsa())


def batch(steps, first=0):
  return steps.batch(rows=4, seq_len=32, first=first)


def is_own(path):
  return 'mechanism' in jax.tree_util.keystr(path)


def test_only_what_is_named_a_loss_is_added():
  aux = {'density': 9.0, 'loss/a': 2.0, 'loss/b': 0.5, 'lossless': 7.0}
  aux = {name: jnp.float32(value) for name, value in aux.items()}
  assert tasks.auxiliary(aux, jnp.float32(10)) == 25
  assert tasks.auxiliary({}, jnp.float32(10)) == 0


def test_the_gradient_is_that_of_the_text_and_the_auxiliary_loss(steps):
  state, rows = steps.init(), batch(steps)

  def loss_of(params):
    model = steps.program.merge(params, state.model_state)
    loss = steps.task.loss(model, rows, AttentionContext(step=2, train=True))
    mean = loss.total / loss.weight + loss.means['loss/index_kl']
    return mean, loss

  with jax.set_mesh(steps.mesh):
    (_, loss), want = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
      state.params
    )
    got, _, found = jax.jit(
      lambda state, rows: step_lib._gradients(
        1, steps.task, steps.program, state, rows
      )
    )(state._replace(step=jnp.int32(2)), rows)
  own = 0
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(a / found.weight, b, 1e-4, 1e-7)
    own += is_own(path) and float(jnp.abs(b).max()) > 0
  assert own == 3
  assert found.auxiliary > 0
  logged = steps.task.metrics(found)
  np.testing.assert_allclose(logged['loss'], loss.total / loss.weight, 1e-6)


def test_stage_one_trains_the_indexer_and_nothing_else(steps):
  """Not by a gradient, not by weight decay, not by running statistics."""
  state, seen = steps.init(), []
  states = [tiny.host(state)]
  for i in range(4):
    state, logged = steps.train_step(state, batch(steps, first=4 * i))
    states.append(tiny.host(state))
    seen.append({k: float(v) for k, v in logged.items()})
  assert steps.train_step.jitted._cache_size() == 1
  for before, after, frozen in zip(
    states, states[1:], (True, True, False, False), strict=False
  ):
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(before.params),
      jax.tree.leaves(after.params),
      strict=True,
    ):
      moved = a.tobytes() != b.tobytes()
      assert moved == (is_own(path) or not frozen) or not a.any(), path
    same = [
      a.tobytes() == b.tobytes()
      for a, b in zip(
        jax.tree.leaves(before.model_state),
        jax.tree.leaves(after.model_state),
        strict=True,
      )
    ]
    assert all(same) if frozen else not any(same)
  assert [x['density'] for x in seen[:2]] == [1, 1]
  assert max(x['density'] for x in seen[2:]) < 0.9
  assert all(x['loss/index_kl'] > 0 for x in seen)


def test_evaluation_leaves_the_auxiliary_loss_out(steps):
  loss = steps.eval_step(steps.init(), batch(steps))
  assert loss.auxiliary == 0
  assert not [name for name in loss.means if name.startswith('loss/')]


@pytest.mark.parametrize(
  'changes',
  [{'accumulate': 2}, {'data': 2, 'tensor': 2}],
  ids=['accumulate2', 'data2-tensor2'],
)
def test_micro_batches_and_a_mesh_change_nothing(steps, changes):
  """In stage 1, where the auxiliary loss is all that trains."""
  other = tiny.Steps(tiny.config_dsa(**changes))
  found = []
  for one in (steps, other):
    state, logged = one.train_step(one.init(), batch(one))
    found.append((tiny.host(state), tiny.host(logged)))
  (left, want), (right, got) = found
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, 2e-4, 1e-6, err_msg=name)
  moments = [
    next(s.mu for s in x.opt_state if hasattr(s, 'mu')) for x in (left, right)
  ]
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(moments[0]),
    jax.tree.leaves(moments[1]),
    strict=True,
  ):
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-12, path
    assert is_own(path) == bool(a.any()), path
