"""Decoding with psa, token by token, against its prefill."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.attention import psa as module
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import AttentionConfig, ScheduleConfig
from psa_jax.kernels import block_scores
from psa_jax.kernels.decode import decode_attention
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, N, K, H, HV, ROOM = 2, 4, 2, 8, 12, 120


def settings(amount=0.4, **kw):
  at = ScheduleConfig(init=amount, final=amount)
  base = dict(block_q=16, block_k=8, window=12, keep=at, mass=at)
  return PsaConfig(**base | kw)


SETTINGS = {
  'ratio': settings(),
  'ratio, bounds': settings(scoring='bounds'),
  'mass': settings(0.6, budget='mass'),
  'mass, bounds': settings(1e-3, budget='mass', scoring='bounds'),
  'per token': settings(block_q=1, block_k=4),
  'tile within a block': settings(block_q=4, block_k=16, window=5),
  'tile across blocks': settings(block_q=12, block_k=8, window=3),
  'short lists': settings(0.9, max_blocks=6),
  'all': settings(1.0),
}


def arrays(T, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, HV)
  return tuple(
    (rng.normal(size=shape) * scale).astype(np.float32)
    for shape, scale in zip(shapes, (2, 1, 1), strict=True)
  )


def budget(cfg):
  return module.budget_at(cfg, 0, True)


def prefill(cfg, q, k, v, segment_ids=None):
  """The output of psa, and its lists."""

  @jax.jit
  def run(q, k, v):
    lists = module.select_blocks(
      q, k, cfg, budget=budget(cfg), segment_ids=segment_ids
    )
    out = module.psa(
      q,
      k,
      v,
      config=AttentionConfig(name='psa', psa=cfg),
      context=AttentionContext(step=0, segment_ids=segment_ids),
    )
    return out.out, lists

  return jax.tree.map(np.asarray, run(q, k, v))


class Decoder:
  """A cache as three arrays and a list, stepped one token at a time."""

  def __init__(self, cfg, room=ROOM):
    self.cfg, self.room = cfg, room
    self.k = jnp.zeros((B, room, K, H))
    self.v = jnp.zeros((B, room, K, HV))
    self.pooled = block_scores.empty(
      B, room, K, H, block_k=cfg.block_k, bounds=cfg.scoring == 'bounds'
    )
    blocks = -(-room // cfg.block_k)
    width = module.list_width(cfg, blocks)
    self.lists = module.BlockList(
      jnp.zeros((B, K, 1, width), jnp.int32),
      *[jnp.zeros((B, K, 1), jnp.int32)] * 2,
    )
    self.lengths = jnp.zeros((B,), jnp.int32)

  def fill(self, q, k, v, lengths):
    """Takes a prompt of its own length for every row."""
    pad = [(0, 0), (0, self.room - k.shape[1]), (0, 0), (0, 0)]
    self.k, self.v = jnp.asarray(np.pad(k, pad)), jnp.asarray(np.pad(v, pad))
    bounds = self.cfg.scoring == 'bounds'
    self.pooled = block_scores.pool(
      self.k, block_k=self.cfg.block_k, bounds=bounds, lengths=lengths
    )
    first = (lengths - 1) // self.cfg.block_q * self.cfg.block_q
    self.lists = module.select_for_decode(
      jnp.asarray(q)[jnp.arange(B), first][:, None],
      self.pooled,
      self.cfg,
      positions=first,
      budget=budget(self.cfg),
    )
    self.lengths = lengths

  def step(self, q, k, v, on=(True,) * B, starts=(0,) * B):
    """One more token for the rows that are `on`; (out, lists)."""
    on, starts = jnp.asarray(on), jnp.asarray(starts, jnp.int32)
    state = self.k, self.v, self.pooled, self.lists, self.lengths
    out, state = _step(state, q, k, v, on, starts, self.cfg)
    self.k, self.v, self.pooled, self.lists, self.lengths = state
    return np.asarray(out), jax.tree.map(np.asarray, self.lists)


@functools.partial(jax.jit, static_argnames='cfg')
def _step(state, q, k, v, on, starts, cfg):
  keys, values, pooled, lists, lengths = state
  row, at = jnp.arange(B), jnp.where(on, lengths, keys.shape[1])
  keys = keys.at[row, at].set(k[:, 0], mode='drop')
  values = values.at[row, at].set(v[:, 0], mode='drop')
  pooled = block_scores.append(
    pooled,
    k,
    lengths,
    block_k=cfg.block_k,
    starts=starts[:, None],
    counts=on.astype(jnp.int32),
  )
  lengths = lengths + on
  lists = module.next_blocks(
    lists,
    q,
    pooled,
    cfg,
    lengths=jnp.where(on, lengths, 0),
    budget=budget(cfg),
    starts=starts,
  )
  out, _ = decode_attention(
    q,
    keys,
    values,
    lists.ids[:, :, 0],
    lists.counts[:, :, 0],
    lengths,
    block_k=cfg.block_k,
    starts=starts,
  )
  return out, (keys, values, pooled, lists, lengths)


def same_list(got, want, b, tile, T, block_k):
  """Both read the same blocks in the same order, of those before T."""
  for h in range(K):
    ids = got.ids[b, h, 0][: got.counts[b, h, 0]]
    ids = ids[ids * block_k < T]
    expected = want.ids[b, h, tile][: want.counts[b, h, tile]]
    np.testing.assert_array_equal(ids, expected, f'{b=} {h=} {tile=}')


@pytest.mark.parametrize('name', list(SETTINGS))
def test_decode_is_prefill_token_by_token(name):
  """From nothing, over several tiles, to an end inside one of them."""
  cfg, T = SETTINGS[name], 70
  q, k, v = arrays(T)
  want, lists = prefill(cfg, q, k, v)
  decoder, outs = Decoder(cfg), []
  for t in range(T):
    out, got = decoder.step(*(x[:, t : t + 1] for x in (q, k, v)))
    outs.append(out)
    for b in range(B):
      same_list(got, lists, b, t // cfg.block_q, T, cfg.block_k)
  oracles.check_close(np.concatenate(outs, 1), want)
  sparse = (lists.counts < lists.visible).any()
  assert sparse == (name != 'all')


@pytest.mark.parametrize('name', ['ratio', 'mass, bounds'])
def test_documents(name):
  """Documents begin inside a tile and a block, another one at each row."""
  cfg, T = SETTINGS[name], 70
  begins = np.zeros((B, T), bool)
  begins[0, [21, 48]] = begins[1, 35] = True
  starts = np.maximum.accumulate(np.where(begins, np.arange(T), 0), 1)
  segments = jnp.asarray(np.cumsum(begins, 1), jnp.int32)
  q, k, v = arrays(T, seed=1)
  want, lists = prefill(cfg, q, k, v, segments)
  decoder, outs = Decoder(cfg), []
  for t in range(T):
    row = (x[:, t : t + 1] for x in (q, k, v))
    out, got = decoder.step(*row, starts=starts[:, t])
    outs.append(out)
    for b in range(B):
      same_list(got, lists, b, t // cfg.block_q, T, cfg.block_k)
  oracles.check_close(np.concatenate(outs, 1), want)


@pytest.mark.parametrize('name', ['ratio', 'mass', 'short lists'])
def test_ragged_rows_continue_their_prompts(name):
  """Prompts end inside a tile, and one row waits while the other goes on."""
  cfg, T = SETTINGS[name], 70
  q, k, v = arrays(T, seed=2)
  want, lists = prefill(cfg, q, k, v)
  decoder = Decoder(cfg)
  prompt = np.array([19, 37])
  decoder.fill(q[:, :40], k[:, :40], v[:, :40], jnp.asarray(prompt))
  at, turn, seen = prompt.copy(), 0, 0
  while (at < T).any():
    on = (at < T) & np.array([True, turn % 3 != 0])
    row = np.arange(B), np.minimum(at, T - 1)
    out, got = decoder.step(*(x[row][:, None] for x in (q, k, v)), on=on)
    for b in np.flatnonzero(on):
      same_list(got, lists, b, at[b] // cfg.block_q, T, cfg.block_k)
      oracles.check_close(out[b, 0], want[b, at[b]])
      seen += 1
    at, turn = at + on, turn + 1
  assert seen == 2 * T - prompt.sum()


def test_nothing_is_scored_within_a_tile(monkeypatch):
  """The previous list comes back bit for bit, whatever the query."""
  cfg = SETTINGS['ratio']
  q, k, v = arrays(40)
  decoder = Decoder(cfg)
  decoder.fill(q, k, v, jnp.asarray([33, 0]))
  before = decoder.lists
  lists = module.next_blocks(
    before,
    jnp.full((B, 1, N, H), jnp.nan),
    decoder.pooled,
    cfg,
    lengths=jnp.asarray([34, 0]),
    budget=0.4,
  )
  for a, b in zip(lists, before, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('name', ['ratio', 'mass', 'short lists'])
def test_a_longer_sequence_reads_the_same(name):
  """What a token reads does not depend on where the sequence ends."""
  cfg = SETTINGS[name]
  q, k, v = arrays(70)
  want, _ = prefill(cfg, q, k, v)
  for T in (49, 50, 57, 64):
    got, _ = prefill(cfg, q[:, :T], k[:, :T], v[:, :T])
    oracles.check_close(got, want[:, :T])
