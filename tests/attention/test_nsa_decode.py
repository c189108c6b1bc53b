"""Decoding with NSA equals prefill, token by token, across every boundary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention.nsa import decode as nsa_decode
from psa_jax.config import ScheduleConfig
from psa_jax.types import Learned
from tests import oracles
from tests.attention import test_nsa
from tests.attention.nsa_oracle import Sizes

pytestmark = pytest.mark.tier('default')

SIZES = Sizes(l=6, d=2, select=8, n=4, w=5)
ROOM = 40
CASES = {
  'nsa': (SIZES, {}),
  'shared': (dataclasses.replace(SIZES, l=4, d=4), dict(shared=True)),
  'wide window, G=1': (
    Sizes(l=9, d=3, select=9, n=4, w=17, local=1),
    dict(G=1, positions=False),
  ),
  'tile': (dataclasses.replace(SIZES, tile=4), {}),
  'tile of a block, shared': (
    dataclasses.replace(SIZES, tile=8, n=3),
    dict(shared=True),
  ),
}
every = pytest.mark.parametrize('case', list(CASES))


def tokens(x, begin, end):
  """The arrays of `test_nsa.inputs` for some tokens."""
  whole = ('k_place', 'k_in', 'k_out', 'v_place', 'v_in', 'v_out')
  return {
    n: jnp.asarray(a if n in whole else a[:, begin:end]) for n, a in x.items()
  }


def settings(case):
  sizes, kw = CASES[case]
  shared = kw.get('shared', False)
  cfg = test_nsa.config(sizes, share_kv=shared)
  return cfg, test_nsa.inputs(sizes, T=ROOM, **kw)


@functools.partial(jax.jit, static_argnames='cfg')
def decode(x, cache, cfg, starts=None, active=None):
  return nsa_decode.step(
    x['q'],
    x['k'],
    x['v'],
    cache,
    config=cfg,
    at=0,
    learned=test_nsa.learned(x),
    starts=starts,
    active=active,
  )


@functools.partial(jax.jit, static_argnames='cfg')
def prefill(x, lengths, cfg):
  return nsa_decode.prefill(
    x['q'],
    x['k'],
    x['v'],
    config=cfg,
    at=0,
    learned=test_nsa.learned(x),
    lengths=lengths,
    room=ROOM,
  )


def start(x, cfg):
  k, v = jnp.asarray(x['k']), jnp.asarray(x['v'])
  return nsa_decode.empty(k, v, cfg, room=ROOM)


@every
def test_token_by_token_from_nothing(case):
  cfg, x = settings(case)
  want = test_nsa.run(x, cfg).out
  cache = start(x, cfg)
  for t in range(ROOM):
    out, cache = decode(tokens(x, t, t + 1), cache, cfg)
    oracles.check_close(out[:, 0], want[:, t], what=f'token {t}')
  assert (np.asarray(cache.lengths) == ROOM).all()


@every
def test_ragged_prompts_then_tokens(case):
  """Rows end at different places of a block, a stride and a tile."""
  cfg, x = settings(case)
  want = test_nsa.run(x, cfg).out
  for lengths in ((3, 14), (8, 21), (17, 0)):
    out, cache = prefill(tokens(x, 0, 21), jnp.asarray(lengths), cfg)
    for b, length in enumerate(lengths):
      oracles.check_close(out[b, :length], want[b, :length])
    for step in range(12):
      at = np.asarray(lengths) + step
      new = pick(tokens(x, 0, ROOM), at)
      out, cache = decode(new, cache, cfg)
      for b in range(2):
        oracles.check_close(out[b, 0], want[b, at[b]], what=f'{lengths} {at}')


def pick(x, at):
  """Token at[b] of every row."""
  rows = {n for n, a in x.items() if n in test_nsa.PAIRS or n in ROWS}
  return {
    n: jnp.stack([a[b, t : t + 1] for b, t in enumerate(at)])
    if n in rows
    else a
    for n, a in x.items()
  }


ROWS = ('q', 'k', 'v', 'gates', 'cos', 'sin')


@pytest.mark.parametrize('case', ['nsa', 'tile'])
def test_idle_rows_keep_their_state(case):
  cfg, x = settings(case)
  want = test_nsa.run(x, cfg).out
  cache, lengths = start(x, cfg), np.zeros(2, int)
  rng = np.random.default_rng(0)
  for _ in range(45):
    active = rng.uniform(size=2) < 0.6
    active &= lengths < ROOM
    new = pick(tokens(x, 0, ROOM), np.minimum(lengths, ROOM - 1))
    out, cache = decode(new, cache, cfg, active=jnp.asarray(active))
    for b in np.flatnonzero(active):
      oracles.check_close(out[b, 0], want[b, lengths[b]])
    lengths += active
  np.testing.assert_array_equal(cache.lengths, lengths)


@pytest.mark.parametrize('case', ['nsa', 'tile'])
def test_documents_are_not_mixed(case):
  """Each row's document begins anew where its segment does."""
  cfg, x = settings(case)
  cuts = np.asarray([13, 22])
  segments = jnp.asarray((np.arange(ROOM)[None] >= cuts[:, None]).astype(int))
  want = test_nsa.run(x, cfg, segments).out
  cache = start(x, cfg)
  for t in range(ROOM):
    starts = jnp.asarray(np.where(t >= cuts, cuts, 0))
    out, cache = decode(tokens(x, t, t + 1), cache, cfg, starts=starts)
    oracles.check_close(out[:, 0], want[:, t], what=f'token {t}')


def test_n_of_the_step_and_its_own_outside_training():
  sizes = SIZES
  schedule = ScheduleConfig(kind='linear', init=5.0, final=3.0, length=2)
  cfg = test_nsa.config(sizes, blocks=schedule, eval_blocks=4)
  x = test_nsa.inputs(sizes, T=ROOM)
  want = test_nsa.run(x, cfg, step=0, train=False).out
  cache = start(x, cfg)
  for t in range(ROOM):
    out, cache = decode(tokens(x, t, t + 1), cache, cfg)
  oracles.check_close(out[:, 0], want[:, -1])
  assert (np.asarray(cache.counts) == 4).all()


def test_one_program_for_all_lengths():
  cfg, x = settings('nsa')
  traces = []

  @jax.jit
  def once(x, cache):
    traces.append(1)
    return decode.__wrapped__(x, cache, cfg)

  cache = start(x, cfg)
  for t in range(10):
    _, cache = once(tokens(x, t, t + 1), cache)
  assert len(traces) == 1
  assert isinstance(test_nsa.learned(x), Learned)
