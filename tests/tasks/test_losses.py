"""Next-token loss: float64 oracle, chunks, memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.tasks.losses import answer_loss, label_loss, next_token_loss

pytestmark = pytest.mark.tier('default')

B, T, D, V = 3, 10, 4, 7


class Head:
  """A model that is only its output matrix."""

  def __init__(self, table):
    self.table = table

  def unembed(self, hidden):
    return jnp.einsum('...D,VD->...V', hidden, self.table)


def example(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(V, D)).astype(np.float32),
    rng.normal(size=(B, T, D)).astype(np.float32),
    rng.integers(0, V, size=(B, T)).astype(np.int32),
    rng.choice([0, 0.5, 1, 2], size=(B, T)).astype(np.float32),
  )


def oracle(table, hidden, targets, weights):
  logits = np.float64(hidden) @ np.float64(table).T
  logits -= logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  taken = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  return -(taken * weights).sum(), weights.sum()


def loss(table, hidden, targets, weights, chunk):
  args = map(jnp.asarray, (hidden, targets, weights))
  return next_token_loss(Head(jnp.asarray(table)), *args, chunk=chunk)


# one position a chunk, chunks that leave a rest, exactly all, more than all
@pytest.mark.parametrize('chunk', [1, B, 4 * B, 5 * B + 1, B * T, 10 * B * T])
def test_value_against_float64(chunk):
  args = example()
  got = loss(*args, chunk)
  np.testing.assert_allclose(got, oracle(*args), rtol=1e-5)
  assert got[0].dtype == got[1].dtype == jnp.float32


@pytest.mark.parametrize('chunk', [1, 4 * B])
def test_gradient_does_not_depend_on_chunks(chunk):
  args = example()

  def grad(chunk):
    function = jax.grad(lambda *args: loss(*args, chunk)[0], argnums=(0, 1))
    return jax.jit(function)(*args)

  for a, b in zip(grad(chunk), grad(B * T), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('chunk', [4 * B, B * T])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_position_of_weight_0_counts_nothing_even_if_it_is_nan(chunk, value):
  """Neither in the value nor in any gradient, that of the head included."""
  table, hidden, targets, weights = example()
  weights[1, 3] = 0
  run = jax.value_and_grad(lambda *args: loss(*args, chunk)[0], (0, 1))
  expected = run(table, hidden, targets, weights)
  hidden[1, 3], targets[1, 3] = value, 0
  got = run(table, hidden, targets, weights)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert (got[1][1][1, 3] == 0).all() and (got[1][0] != 0).any()


def test_logits_never_exist_for_more_than_a_chunk():
  args, chunk = example(), 2 * B

  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      for var in eqn.outvars:
        if V in var.aval.shape:
          yield math.prod(var.aval.shape)
      for param in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
      ):
        inner = getattr(param, 'jaxpr', param)
        if hasattr(inner, 'eqns'):
          yield from sizes(inner)

  def largest(chunk):
    function = jax.grad(lambda *args: loss(*args, chunk)[0], argnums=(0, 1))
    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))

  assert largest(B * T) == B * T * V, 'the search finds no logits'
  assert largest(chunk) == chunk * V


def questions(seed=0):
  """Two questions of two tokens a row; the last one has weight 0."""
  rng = np.random.default_rng(seed)
  table, hidden, _, _ = example(seed)
  answers = rng.integers(0, T, (B, 2, 2)).astype(np.int32)
  targets = rng.integers(0, V, (B, 2, 2)).astype(np.int32)
  weights = np.float32([[1, 1], [1, 2], [1, 0]])
  return table, hidden, answers, targets, weights


def judged(table, hidden, answers, targets, weights):
  args = map(jnp.asarray, (hidden, answers, targets, weights))
  return answer_loss(Head(jnp.asarray(table)), *args)


def test_answers_are_judged_where_they_are_asked():
  table, hidden, answers, targets, weights = args = questions()
  best = np.argmax(hidden @ table.T, -1)
  rows = np.arange(B)[:, None]
  targets[0] = best[0][answers[0]]  # both right
  targets[1, 0] = best[1][answers[1, 0]]
  targets[1, 0, 1] = (targets[1, 0, 1] + 1) % V  # one of its two tokens wrong
  flat = answers.reshape(B, 4)
  want = oracle(
    table,
    hidden[rows, flat],
    targets.reshape(B, 4),
    np.repeat(weights, 2, axis=1),
  )
  nats, weight, hits = judged(*args)
  np.testing.assert_allclose((nats, weight), want, rtol=1e-5)
  truth = (best[rows, flat].reshape(B, 2, 2) == targets).all(-1)
  np.testing.assert_array_equal(hits, truth)
  assert hits[0].all() and not hits[1, 0]


def test_only_judged_positions_get_a_gradient():
  table, hidden, answers, targets, weights = questions()

  def total(hidden):
    return judged(table, hidden, answers, targets, weights)[0]

  grad = np.asarray(jax.grad(total)(jnp.asarray(hidden)))
  counted = np.zeros((B, T), bool)
  for row, question in np.ndindex(B, 2):
    counted[row, answers[row, question]] |= weights[row, question] > 0
  np.testing.assert_array_equal((grad != 0).any(-1), counted)


def test_a_question_of_weight_0_counts_nothing_even_if_it_is_nan():
  table, hidden, answers, targets, weights = questions()
  answers[2] = [[0, 1], [8, 9]]
  run = jax.value_and_grad(
    lambda *args: judged(*args, answers, targets, weights)[0], (0, 1)
  )
  expected = run(table, hidden)
  broken = hidden.copy()  # the first run may still be reading
  broken[2, 8:] = np.nan
  got = run(table, broken)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_a_label_of_weight_0_counts_nothing_even_if_it_is_nan(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 4)).astype(np.float32)
  labels = jnp.asarray(rng.integers(0, 4, 6), jnp.int32)
  weights = jnp.asarray([1.0, 0, 2, 1, 0, 1])

  @jax.jit
  def run(logits):
    return jax.value_and_grad(
      lambda x: label_loss(x, labels, weights, smoothing=smoothing),
      has_aux=True,
    )(logits)

  expected = run(logits)
  broken = logits.copy()  # the first run may still be reading
  broken[1], broken[4, 2] = np.nan, np.inf
  got = run(broken)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_label_loss_against_float64(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 4)).astype(np.float32)
  labels, weights = rng.integers(0, 4, 6), rng.choice([0.0, 1.0, 2.0], 6)
  p = np.exp(np.float64(logits))
  log_p = np.log(p / p.sum(-1, keepdims=True))
  aim = np.full((6, 4), smoothing / 4)
  aim[np.arange(6), labels] += 1 - smoothing
  got = label_loss(
    jnp.asarray(logits),
    jnp.asarray(labels, jnp.int32),
    jnp.asarray(weights, jnp.float32),
    smoothing=smoothing,
  )
  np.testing.assert_allclose(
    got[0], -((aim * log_p).sum(-1) * weights).sum(), rtol=1e-5
  )
  assert got[1] == ((logits.argmax(-1) == labels) * weights).sum()
