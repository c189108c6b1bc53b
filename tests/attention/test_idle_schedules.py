"""A schedule that sink and window leave nothing to say is named at start.

What the settings answer without a model is compared with what is really read:
the counts at the schedule's value and at next to nothing.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import psa
from psa_jax.attention.dsa import DsaConfig
from psa_jax.attention.dsa import attention as dsa
from psa_jax.attention.hybrid import HybridConfig, select_blocks
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import ScheduleConfig
from psa_jax.kernels.indexer import Index

pytestmark = pytest.mark.tier('default')

SMALL = dict(block_q=8, block_k=4, window=9)


def keep(value):
  return ScheduleConfig(init=value)


def read(cfg, budget, length):
  """Blocks that are read and visible ones, of every tile."""
  q, k = jnp.ones((1, length, 1, 4)), jnp.ones((1, length, 1, 4))
  if isinstance(cfg, PsaConfig):
    lists = psa.select_blocks(q, k, cfg, budget=budget)
  elif isinstance(cfg, HybridConfig):
    lists = select_blocks(q, k, cfg, cap=budget)[0]
  else:
    index = Index(q, q[..., 0], k[:, :, 0])
    lists = dsa.select_blocks(index, cfg, budget=budget)
  return lists.counts.ravel(), lists.visible.ravel()


@pytest.mark.parametrize(
  ('cfg', 'budget'),
  [
    (PsaConfig(**SMALL, keep=keep(0.2)), 0.2),
    (PsaConfig(block_q=6, block_k=4, window=7, keep=keep(0.3)), 0.3),
    (HybridConfig(**SMALL, keep=keep(0.8), coefficient=0.01), 0.8),
    (DsaConfig(**SMALL, budget='ratio', keep=keep(0.2)), 0.2),
  ],
)
def test_it_acts_from_the_length_that_is_named(cfg, budget):
  text = cfg.idle_schedule('x.', length=24, step=0)
  named = re.fullmatch(
    r'x\.keep asks for .* at 24 tokens .* take (\S+?)[: ].*: it acts from '
    r'(\S+) tokens on',
    text.replace(': it acts', ' : it acts'),
  )
  first = int(named[2])
  assert first > 24
  run = jax.jit(read, static_argnums=(0, 2))
  for length in (24, first - 1, first):
    some, _ = run(cfg, budget, length)
    least, visible = run(cfg, 1e-6, length)
    if isinstance(cfg, HybridConfig):  # what it takes away, not what it adds
      least = visible
    assert (some == least).all() == (length < first), length
    idle = cfg.idle_schedule('x.', length=length, step=0)
    assert (idle is None) == (length == first)
  counts, visible = run(cfg, 1e-6, 24)
  share = np.sum(counts) / np.sum(visible)
  assert float(named[1]) == pytest.approx(float(share), abs=1e-3)


def test_both_numbers_and_the_length_are_named():
  """1,024 tokens with the default window, as docs/mechanisms.md has it."""
  assert PsaConfig(keep=keep(0.03)).idle_schedule(
    'psa.', length=1024, step=0
  ) == (
    'psa.keep asks for a density of 0.03, but at 1,024 tokens sink and window '
    'alone take 0.875: it acts from 23,425 tokens on'
  )


def test_tokens_fewer_than_the_window_act_at_no_length():
  cfg = DsaConfig(top_k=keep(256.0))
  text = cfg.idle_schedule('dsa.', length=4096, step=0)
  assert text.startswith('dsa.top_k asks for a density of 0.0625, but at 4,096')
  assert text.endswith('it acts at no length; raise it, or narrow the window')
  assert DsaConfig().idle_schedule('dsa.', length=4096, step=0) is None


@pytest.mark.parametrize(
  'cfg',
  [
    PsaConfig(),  # dense is what it asks for
    PsaConfig(budget='mass', mass=keep(0.5)),
    DsaConfig(**SMALL | dict(block_q=1, block_k=1, window=1), top_k=keep(3.0)),
    PsaConfig(keep=ScheduleConfig('linear', 1.0, 0.03, length=9)),
  ],
)
def test_what_acts_or_is_not_known_is_not_named(cfg):
  assert cfg.idle_schedule('x.', length=100, step=0) is None
