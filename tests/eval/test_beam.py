"""Beam search, against all sequences there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.eval import beam

pytestmark = pytest.mark.tier('default')

V, T, END, BEGIN = 4, 4, 0, 0


def table(seed):
  """Log p of a token by the two before it; rows differ."""
  rng = np.random.default_rng(seed)
  return jax.nn.log_softmax(jnp.asarray(rng.normal(0, 2, (2, V + 1, V + 1, V))))


def search(log_p, width, penalty):
  """The state is the last token but one of every hypothesis."""

  def advance(state, tokens, at):
    del at
    rows = jnp.arange(2)[:, None]
    return log_p[rows, state, tokens], tokens

  def reorder(state, parents):
    return jnp.take_along_axis(state, parents, axis=1)

  return jax.jit(
    lambda: beam.search(
      advance,
      reorder,
      jnp.full((2, width), V),
      rows=2,
      beam=width,
      length=T,
      begin=BEGIN,
      end=END,
      penalty=penalty,
    )
  )()


def every_hypothesis(log_p, penalty):
  """(score, tokens) of every sequence that ends, or is full."""
  log_p = np.asarray(log_p, np.float64)
  for size in range(1, T + 1):
    for words in itertools.product(range(V), repeat=size):
      inner, last = words[:-1], words[-1]
      if END in inner or (last != END and size < T):
        continue
      total, far, near = 0.0, V, BEGIN
      for word in words:
        total += log_p[far, near, word]
        far, near = near, word
      yield total / size**penalty, (*words, *(END,) * (T - size))


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('penalty', [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all(seed, penalty):
  log_p = table(seed)
  result = search(log_p, V**T, penalty)
  for row in range(2):
    score, tokens = max(every_hypothesis(log_p[row], penalty))
    assert tuple(map(int, result.tokens[row])) == tokens
    assert float(result.score[row]) == pytest.approx(score, abs=1e-5)


def test_a_beam_of_one_is_greedy():
  log_p = table(7)
  result = search(log_p, 1, 1.0)
  for row in range(2):
    want, far, near = [], V, BEGIN
    while len(want) < T and (not want or want[-1] != END):
      far, near = near, int(np.argmax(log_p[row, far, near]))
      want.append(near)
    got = [int(t) for t in result.tokens[row]]
    assert got == want + [END] * (T - len(want))


@pytest.mark.parametrize('width', [2, 3, 8])
def test_scores_are_those_of_what_was_found(width):
  log_p = table(3)
  result = search(log_p, width, 1.0)
  for row in range(2):
    scores = {tokens: s for s, tokens in every_hypothesis(log_p[row], 1.0)}
    want = scores[tuple(map(int, result.tokens[row]))]
    assert float(result.score[row]) == pytest.approx(want, abs=1e-5)
