"""What dsa chooses, and who learns from what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from psa_jax.attention import attend as library_attend
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.dsa import DsaConfig
from psa_jax.attention.dsa import attention as module
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.rotary import rotary
from psa_jax.config import AttentionConfig, ModelConfig, ScheduleConfig
from psa_jax.kernels.indexer import Index
from psa_jax.types import Learned
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, T, N, K, H, J, E = 2, 50, 4, 2, 8, 2, 4


def settings(tokens=24, **kw):
  base = dict(block_q=8, block_k=4, window=6, heads=J, width=E)
  base |= dict(top_k=ScheduleConfig(init=float(tokens)))
  return DsaConfig(**base | kw)


PAPER = dict(block_q=1, block_k=1, window=1, sink_blocks=0)


def arrays(seed=0, t=T):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  index = Index(normal(B, t, J, E), normal(B, t, J), normal(B, t, E))
  return index, normal(B, t, N, H), normal(B, t, K, H), normal(B, t, K, H)


def documents():
  starts = np.stack([np.isin(np.arange(T), (13, 30)), np.arange(T) == 26])
  return jnp.asarray(1 + np.cumsum(starts, 1).astype(np.int32))


def definition(index, cfg, wanted, segments=None):
  """{(b, tile): (forced, ranked others, count)} by the specification."""
  scores = oracles.index_scores(*index)
  bq, bk, found = cfg.block_q, cfg.block_k, {}
  for b in range(B):
    seg = np.zeros(T, int) if segments is None else np.asarray(segments[b])
    for i in range(-(-T // bq)):
      t0, last = i * bq, min((i + 1) * bq, T) - 1
      start = int(np.flatnonzero(seg == seg[t0])[0])
      begin = start // bk
      visible = range(begin, last // bk + 1)
      near = max(0, t0 - cfg.window + 1) // bk
      if (bq, bk, cfg.window, cfg.keep_self) == (1, 1, 1, False):
        near = t0 + 1
      sink = begin + cfg.sink_blocks
      forced = {j for j in visible if j >= near or j < sink}
      pooled = oracles.pool_scores(scores[b, t0], start, bk, cfg.pooling)
      rest = [j for j in visible if j not in forced and (j + 1) * bk <= t0 + 1]
      rest.sort(key=lambda j: (-pooled[j], j))
      cut = (t0 + bq - 1) // bk - last // bk
      count = wanted(len(visible) + cut) - cut
      count = min(max(count, len(forced)), len(visible))
      found[b, i] = forced, rest, count
  return found


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize(
  'cfg',
  [
    settings(),
    settings(pooling='sum'),
    settings(pooling='mass'),
    settings(7, **PAPER),
    settings(7, **PAPER, keep_self=True),
    settings(budget='ratio', keep=ScheduleConfig(init=0.7)),
    settings(block_q=4, block_k=8, sink_blocks=0, window=1),
  ],
)
def test_selection_is_the_definition(cfg, cut):
  index, *_ = arrays()
  seg = documents() if cut else None
  budget = module.budget_at(cfg, 0, True)
  got = jax.jit(
    lambda index: module.select_blocks(
      index, cfg, budget=budget, segment_ids=seg
    )
  )(index)

  def wanted(visible):
    if cfg.budget == 'tokens':
      return int(np.ceil(float(budget) / cfg.block_k - 1e-3))
    return int(np.ceil(float(budget) * visible - 1e-3))

  sparse = 0
  for (b, i), (forced, rest, count) in definition(
    index, cfg, wanted, seg
  ).items():
    ids = np.asarray(got.ids[b, 0, i])[: got.counts[b, 0, i]].tolist()
    assert len(ids) == len(set(ids)) == count, (b, i)
    assert set(ids) == forced | set(rest[: count - len(forced)]), (b, i)
    sparse += len(forced) < count < int(got.visible[b, 0, i])
  assert sparse > 0


@pytest.mark.parametrize('keep_self', [False, True])
def test_per_token_it_is_the_top_k_of_the_paper(keep_self):
  """The k best of all up to the query by I; its own is forced by a key only."""
  index, q, k, v = arrays()
  cfg = settings(9, **PAPER, keep_self=keep_self)
  out, aux = run(q, k, v, index, AttentionConfig('dsa', dsa=cfg))
  scores = oracles.index_scores(*index)
  mask = np.zeros((B, K, T, T), bool)
  for b, t in np.ndindex(B, T):
    if keep_self:
      scores[b, t, t] = np.inf
    best = np.argsort(-scores[b, t, : t + 1], kind='stable')[:9]
    mask[b, :, t, best] = True
  assert mask[:, 0, np.arange(T), np.arange(T)].all() == keep_self
  oracles.check_close(out, oracles.attention(q, k, v, mask)[0])
  want, _ = oracles.index_divergence(index, q, k, mask[:, 0])
  np.testing.assert_allclose(aux['loss/index_kl'], want.mean(), 1e-4)


@functools.partial(jax.jit, static_argnames=('config', 'train'))
def run(q, k, v, index, config, step=0, train=True):
  return module.dsa(
    q,
    k,
    v,
    config=config,
    learned=Learned(tokens=index._asdict()),
    context=AttentionContext(step=step, train=train),
  )


def test_two_stages_in_one_program():
  """Dense with the divergence over all keys; sparse over what is read."""
  index, q, k, v = arrays()
  config = AttentionConfig('dsa', dsa=settings(28, warmup_steps=2))
  run.clear_cache()
  found = [run(q, k, v, index, config, step=jnp.int32(i)) for i in range(4)]
  assert run._cache_size() == 1
  dense = oracles.causal_mask(B, K, T, T)
  for out, aux in found[:2]:
    oracles.check_close(out, oracles.attention(q, k, v, dense)[0])
    want, _ = oracles.index_divergence(index, q, k, dense[:, 0])
    np.testing.assert_allclose(aux['loss/index_kl'], want.mean(), 1e-4)
    assert aux['density'] == 1
    np.testing.assert_allclose(aux['retained_mass'], 1, 1e-5)
  blocks = module.select_blocks(index, config.dsa, budget=28.0)
  mask = dense & oracles.list_mask(
    np.asarray(blocks.ids), np.asarray(blocks.counts), T, T, 8, 4
  )
  for out, aux in found[2:]:
    oracles.check_close(out, oracles.attention(q, k, v, mask)[0])
    want, _ = oracles.index_divergence(index, q, k, mask[:, 0])
    np.testing.assert_allclose(aux['loss/index_kl'], want.mean(), 1e-4)
    assert aux['density'] < 0.9 and aux['retained_mass'] < 0.99


def test_outside_training_there_is_no_divergence_and_an_own_budget():
  index, q, k, v = arrays()
  config = AttentionConfig('dsa', dsa=settings(8, eval_budget=56.0))
  out, aux = run(q, k, v, index, config, train=False)
  assert set(aux) == {'density', 'retained_mass', 'budget'}
  assert aux['density'] == 1 and aux['budget'] == 56
  dense = oracles.attention(q, k, v, oracles.causal_mask(B, K, T, T))[0]
  oracles.check_close(out, dense)


def test_the_schedule_of_tokens_sets_the_density():
  index, q, k, v = arrays()
  ramp = ScheduleConfig(kind='linear', init=56.0, final=8.0, length=3)
  config = AttentionConfig('dsa', dsa=settings(top_k=ramp))
  seen = [run(q, k, v, index, config, step=jnp.int32(i))[1] for i in range(4)]
  assert [float(aux['budget']) for aux in seen] == [56, 40, 24, 8]
  density = [float(aux['density']) for aux in seen]
  assert density[0] == 1 and density == sorted(density, reverse=True)
  assert density[3] < density[1]


def test_a_budget_that_is_given_replaces_the_schedule():
  config = settings(budget='ratio', eval_budget=0.5)
  assert module.budget_at(config, 0, True, jnp.float32(0.25)) == 0.25
  assert module.budget_at(config, 0, True) == 1
  assert module.budget_at(config, 0, False, jnp.float32(0.25)) == 0.5


def layer(**kw):
  config = ModelConfig(
    d_model=16,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    attention=AttentionConfig('dsa', dsa=settings(16, **kw)),
  )
  return SelfAttention(config, rngs=nnx.Rngs(0))


def gradients(of, made, x, step=3):
  """Gradients of the output's sum or of a scalar in parameters and input."""
  graphdef, state = nnx.split(made)
  rope = rotary(jnp.arange(T)[None], head_dim=H, theta=1e4)

  def loss(state, x):
    out, aux = nnx.merge(graphdef, state)(
      x, context=AttentionContext(step=step, rope=rope, train=True)
    )
    return out.sum() if of == 'out' else aux[of]

  return jax.jit(jax.grad(loss, (0, 1)))(state, x)


@pytest.mark.parametrize('warmup', [0, 9])
def test_who_learns_from_what(warmup):
  """The indexer from the divergence only, the model from the text only."""
  made = layer(warmup_steps=warmup)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 16)), jnp.float32)
  grads, dx = gradients('loss/index_kl', made, x)
  own = jax.tree.leaves(grads.mechanism)
  assert len(own) == 3 and all(np.abs(g).max() > 0 for g in own)
  for name in ('wq', 'wk', 'wv', 'wo'):
    assert (np.asarray(grads[name][...]) == 0).all(), name
  assert (np.asarray(dx) == 0).all()
  grads, dx = gradients('out', made, x)
  assert all(
    (np.asarray(g) == 0).all() for g in jax.tree.leaves(grads.mechanism)
  )
  assert all(
    np.abs(grads[name][...]).max() > 0 for name in ('wq', 'wk', 'wv', 'wo')
  )
  assert np.abs(dx).max() > 0


@pytest.mark.parametrize(
  'cfg',
  [
    settings(24),
    settings(budget='ratio', keep=ScheduleConfig(init=0.6)),
    settings(9, **PAPER),
    settings(9, **PAPER, keep_self=True),
  ],
)
def test_decoding_chooses_what_prefill_chose(cfg):
  """With a cache that has room, and later keys in it already."""
  index, *_ = arrays(t=48)
  amount = module.budget_at(cfg, 0, True)
  want = module.select_blocks(index, cfg, budget=amount)
  room = jnp.pad(index.k, ((0, 0), (0, 16), (0, 0)), constant_values=9.0)
  select = jax.jit(
    functools.partial(module.select_for_decode, cfg=cfg, budget=amount)
  )
  tiles = 48 // cfg.block_q
  for i in range(0, tiles, tiles // 6):
    at = slice(cfg.block_q * i, cfg.block_q * i + 1)
    one = Index(index.q[:, at], index.weights[:, at], room)
    got = select(one, positions=jnp.full((B,), cfg.block_q * i))
    for b in range(B):
      count = int(want.counts[b, 0, i])
      assert got.counts[b, 0, 0] == count
      assert set(np.asarray(got.ids[b, 0, 0, :count]).tolist()) == set(
        np.asarray(want.ids[b, 0, i, :count]).tolist()
      )


def test_stage_one_teaches_the_indexer_where_the_mass_is():
  """Adam on the divergence alone, then recall of the dense mass.

  At the same budget, against the choice of an indexer that never trained, a
  token at a time: queries of random inputs have nothing in common to share.
  """
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(B, T, 16)), jnp.float32)
  made = layer(warmup_steps=100, **PAPER)
  made.wq[...] = 3 * made.wq[...]  # peaked attention: there is much to find
  graphdef, params, rest = nnx.split(made, nnx.Param, ...)
  rope = rotary(jnp.arange(T)[None], head_dim=H, theta=1e4)

  def run(params, step):
    merged = nnx.merge(graphdef, params, rest)
    return merged(
      x, context=AttentionContext(step=step, rope=rope, train=True)
    )[1]

  optimizer = optax.adam(0.02)

  @jax.jit
  def update(params, moments):
    def loss(params):
      return run(params, 0)['loss/index_kl']

    kl, grads = jax.value_and_grad(loss)(params)
    moves, moments = optimizer.update(grads, moments)
    return optax.apply_updates(params, moves), moments, kl

  mass = jax.jit(lambda params: run(params, 100)['retained_mass'])
  before, moments, kls = mass(params), optimizer.init(params), []
  for _ in range(60):
    params, moments, kl = update(params, moments)
    kls.append(float(kl))
  assert kls[-1] < 0.6 * kls[0]
  assert mass(params) > before + 0.05


def test_a_bidirectional_model_is_refused():
  index, q, k, v = arrays()
  with pytest.raises(ValueError, match='dsa is causal'):
    library_attend(
      q,
      k,
      v,
      config=AttentionConfig('dsa'),
      learned=Learned(tokens=index._asdict()),
      context=AttentionContext(step=0, causal=False),
    )


def test_list_width():
  assert module.list_width(settings(64), 1000) == 17
  assert module.list_width(settings(4), 1000) == 6
  assert module.list_width(settings(4, eval_budget=80.0), 1000) == 21
  half = dict(budget='ratio', keep=ScheduleConfig(init=0.5))
  assert module.list_width(settings(**half), 1000) == 501
  assert module.list_width(dataclasses.replace(settings(9**9)), 10) == 10
