"""The encoder-decoder: what it sees, an oracle, decoding with its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models, sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  ModelConfig,
  NormConfig,
  ScheduleConfig,
)

pytestmark = pytest.mark.tier('default')

V, S, T, L, N, K, D, H = 23, 7, 6, 2, 4, 2, 16, 4
SIZES = np.array([7, 4])
RMS = NormConfig()
PREPBN = NormConfig('prepbn', decay_steps=4, scale_init=1.0, eta_init=0.5)


def config(name='dense', keep=0.5, norm=RMS, **changes):
  schedule = ScheduleConfig('constant', init=keep)
  topk = TopkConfig(keep=schedule, learnable=name == 'topk')
  return ModelConfig(
    kind='encoder_decoder',
    num_layers=L,
    d_model=D,
    num_heads=N,
    num_kv_heads=K,
    mlp_dim=24,
    norm=norm,
    attention=AttentionConfig(name=name, topk=topk),
    **changes,
  )


def build(cfg):
  model = models.build(cfg, V, rngs=nnx.Rngs(0))
  assert isinstance(model, models.EncoderDecoder)
  return model


def texts(seed=0):
  rng = np.random.default_rng(seed)
  ids = (np.arange(S)[None] < SIZES[:, None]).astype(np.int32)
  source = rng.integers(1, V, (2, S)) * ids
  return (
    *map(jnp.asarray, (source, ids)),
    jnp.asarray(rng.integers(0, V, (2, T))),
  )


def run(cfg, model, *, train=False, step=0, **changes):
  source, ids, tokens = texts()
  inputs = dict(source=source, source_ids=ids, tokens=tokens) | changes
  tokens, mask = inputs.pop('tokens'), inputs.pop('mask', None)
  context = AttentionContext(step=step, train=train, mask=mask)
  return model(tokens, **inputs, context=context)


def read_densely(model):
  """The model of the same weights with dense attention."""
  attention = model.config.attention.read_by('dense')
  cfg = dataclasses.replace(model.config, attention=attention)
  params = nnx.state(model, lambda path, _: 'mechanism' not in path)
  return nnx.merge(nnx.graphdef(build(cfg)), params)


def oracle(model, source, tokens):
  """Both stacks of one pair in float64, one head at a time."""
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def rms(x, scale):
    return (
      x
      / np.sqrt((x**2).mean(-1, keepdims=True) + NormConfig().base_eps)
      * scale
    )

  def turn(x):
    angle = np.arange(len(x))[:, None] * 500_000.0 ** (
      -2 * np.arange(H // 2) / H
    )
    a, b = x[:, : H // 2], x[:, H // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def attend(w, x, memory, *, causal=False):
    total = np.zeros_like(x)
    for head in range(N):
      q, group = x @ w['wq'][:, head], head // (N // K)
      k, v = (memory @ w[name][:, group] for name in ('wk', 'wv'))
      q, k = turn(q), turn(k)
      scores = q @ k.T / H**0.5
      if causal:
        scores = np.where(np.tri(len(x)) > 0, scores, -np.inf)
      p = np.exp(scores - scores.max(-1, keepdims=True))
      total += p / p.sum(-1, keepdims=True) @ v @ w['wo'][head]
    return total

  def feed(w, x):
    gate = x @ w['w_gate']
    return (gate / (1 + np.exp(-gate)) * (x @ w['w_up'])) @ w['w_down']

  def layer(stack, i):
    return jax.tree.map(lambda x: x[i], params[stack])

  x = params['embedding'][source]
  for i in range(L):
    w = layer('encoder_layers', i)
    n = rms(x, w['attention_norm']['scale'])
    x = x + attend(w['attention'], n, n)
    x = x + feed(w['mlp'], rms(x, w['mlp_norm']['scale']))
  memory = rms(x, params['encoder_norm']['scale'])
  x = params['embedding'][tokens]
  for i in range(L):
    w = layer('layers', i)
    n = rms(x, w['attention_norm']['scale'])
    x = x + attend(w['attention'], n, n, causal=True)
    n = rms(x, w['cross_norm']['scale'])
    x = x + attend(w['cross'], n, memory)
    x = x + feed(w['mlp'], rms(x, w['mlp_norm']['scale']))
  return rms(x, params['final_norm']['scale'])


def test_equals_the_oracle():
  model = build(config())
  source, _, tokens = map(np.asarray, texts())
  found = run(config(), model)
  for b in range(2):
    want = oracle(model, source[b, : SIZES[b]], tokens[b])
    np.testing.assert_allclose(found.hidden[b], want, atol=2e-5)
  assert float(found.aux['density']) == float(found.aux['cross_density']) == 1


@pytest.mark.parametrize('name', ['dense', 'topk'])
def test_sees_the_source_and_what_is_before(name):
  model = build(config(name))
  source, ids, tokens = texts()
  base = run(config(name), model).hidden
  later = tokens.at[:, 4].set((tokens[:, 4] + 1) % V)
  moved = np.abs(run(config(name), model, tokens=later).hidden - base).max(-1)
  assert moved[:, :4].max() == 0 < moved[:, 4:].min()
  other = source.at[:, 1].set(1 + source[:, 1] % (V - 1))
  moved = np.abs(run(config(name), model, source=other).hidden - base).max(-1)
  assert moved.min() > 0
  padded = jnp.where(ids > 0, source, 5)
  same = run(config(name), model, source=padded).hidden
  np.testing.assert_array_equal(same, base)


def test_topk_that_keeps_all_is_dense_and_less_is_not():
  model = build(config('topk', keep=1.0))
  whole = run(config(), model).hidden
  dense = run(config(), read_densely(model)).hidden
  np.testing.assert_allclose(whole, dense, atol=2e-5)
  sparse = run(config(), build(config('topk', keep=0.3)))
  assert np.abs(sparse.hidden - dense).max() > 1e-2
  assert float(sparse.aux['cross_density']) < 0.4
  assert float(sparse.aux['density']) < 0.6


@pytest.mark.parametrize('norm', [NormConfig(), PREPBN])
@pytest.mark.parametrize('name', ['dense', 'topk'])
def test_decoding_a_token_at_a_time_is_reading_all(name, norm):
  """Three hypotheses a text, each with tokens of its own."""
  cfg, width = config(name, norm=norm, biases=True), 3
  model = build(cfg)
  source, ids, _ = texts()
  rng = np.random.default_rng(3)
  tokens = jnp.asarray(rng.integers(0, V, (2, width, T)))
  want = jnp.stack([
    model.unembed(
      run(cfg, model, tokens=tokens[:, w], step=9).hidden
    ) for w in range(width)
  ], 1)  # fmt: skip
  context = AttentionContext(step=9, train=False)
  decoding = model.start(
    source, ids, hypotheses=width, length=T, context=context
  )
  for t in range(T):
    logits, decoding = model.advance(
      decoding, tokens[:, :, t], jnp.int32(t), context=context
    )
    np.testing.assert_allclose(logits, want[:, :, t], atol=3e-5)


def test_scan_and_loop_agree_and_statistics_move():
  cfg = config(norm=PREPBN)
  found = []
  for scan in (True, False):
    model = build(config(norm=PREPBN, scan_layers=scan))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    hidden = run(cfg, model, train=True, step=1).hidden
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    moved = jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).max()), before, after
    )
    assert min(jax.tree.leaves(moved)) > 0
    found.append((hidden, after))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def test_every_array_has_a_name_and_a_gradient():
  model = build(config('topk', biases=True, tie_embeddings=False))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params):
    model = nnx.merge(graphdef, params, rest)
    return (model.unembed(run(config(), model, train=True).hidden) ** 2).sum()

  grads = nnx.to_pure_dict(jax.grad(loss)(params))
  for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
    sharding.axis_names(path, grad)
    assert float(jnp.abs(grad).max()) > 0, path
