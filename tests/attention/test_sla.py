"""Simplified linear attention against loops, both ways, and its decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import sharding
from psa_jax.attention import sla as module
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.sla import SlaConfig, SlaParameters
from psa_jax.config import AttentionConfig, ModelConfig
from psa_jax.kernels.linear_attention import linear_attention, xla
from psa_jax.models import DecoderLM
from psa_jax.types import Learned
from tests import oracles

pytestmark = pytest.mark.tier('default')

B, T, N, K, H, HV, P = 2, 19, 4, 2, 6, 5, 7
CONFIG = AttentionConfig('sla')


def arrays(seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, HV)
  return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def parameters(seed=5, rows=P):
  rng = np.random.default_rng(seed)
  shapes = (rows, K, H), (5, HV), (HV,)
  return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def learned(position, conv, bias):
  table = jnp.broadcast_to(position[None], (B, *position.shape))
  weights = {'conv': conv, 'conv_bias': bias}
  return Learned(heads={'position': table}, weights=weights)


def documents():
  """Documents shorter and longer than the table, one of a single token."""
  starts = np.stack([np.isin(np.arange(T), (9, 10)), np.arange(T) == 3])
  return jnp.asarray(np.cumsum(starts, 1).astype(np.int32))


@functools.partial(jax.jit, static_argnames=('causal',))
def run(q, k, v, given, seg, causal):
  return module.sla(
    q,
    k,
    v,
    config=CONFIG,
    learned=learned(*given),
    context=AttentionContext(segment_ids=seg, causal=causal),
  )


def segments(seg):
  return np.zeros((B, T), int) if seg is None else np.asarray(seg)


def definition(args, given, seg, causal):
  return oracles.sla(*args, *given, causal=causal, segments=segments(seg))


both = pytest.mark.parametrize('causal', [True, False])
packed = pytest.mark.parametrize('cut', [False, True])


@both
@packed
@pytest.mark.parametrize('chunk', [4, 128])
def test_it_is_the_definition(causal, cut, chunk, monkeypatch):
  """Also over several chunks, with documents that end inside of one."""
  monkeypatch.setattr(xla, 'CHUNK', chunk)
  run.clear_cache()
  args, given = arrays(), parameters()
  seg = documents() if cut else None
  out, aux = run(*args, given, seg, causal)
  oracles.check_close(out, definition(args, given, seg, causal))
  seg = segments(seg)
  seen = seg[:, :, None] == seg[:, None]
  seen = (np.tril(seen) if causal else seen).sum(-1)
  np.testing.assert_allclose(
    aux['density'], np.minimum(1, H / seen).mean(), 1e-6
  )


@both
@packed
def test_gradients_are_slopes_of_the_definition(causal, cut, monkeypatch):
  """In random directions, by central differences in float64."""
  monkeypatch.setattr(xla, 'CHUNK', 4)
  run.clear_cache()
  inputs = arrays() + parameters()
  seg = documents() if cut else None
  rng = np.random.default_rng(2)
  d_out = rng.normal(size=(B, T, N, HV))

  def loss(*x):
    return (run(*x[:3], x[3:], seg, causal)[0] * d_out).sum()

  grads = jax.grad(loss, tuple(range(6)))(*inputs)
  inputs = [np.asarray(x, np.float64) for x in inputs]
  for i, grad in enumerate(grads):
    way = rng.normal(size=inputs[i].shape)
    values = []
    for sign in (1, -1):
      x = list(inputs)
      x[i] = x[i] + sign * 1e-6 * way
      values.append((definition(x[:3], x[3:], seg, causal) * d_out).sum())
    slope = (values[0] - values[1]) / 2e-6
    assert abs(slope) > 1e-3
    got = (np.asarray(grad, np.float64) * way).sum()
    assert got == pytest.approx(slope, rel=2e-4, abs=2e-4), i


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@both
@packed
def test_the_kernel_by_itself(implementation, causal, cut, monkeypatch):
  monkeypatch.setattr(xla, 'CHUNK', 8)
  q, k, v = arrays()
  q, k = jax.nn.relu(q), jax.nn.relu(k)
  seg = documents() if cut else None
  same = segments(seg)
  mask = same[:, :, None] == same[:, None]
  out = linear_attention(
    q, k, v, causal=causal, segment_ids=seg, implementation=implementation
  )
  mask = np.tril(mask) if causal else mask
  oracles.check_close(out, oracles.linear_attention(q, k, v, mask))


@both
def test_rows_without_a_weight_are_the_convolution_alone(causal):
  """The denominator is 0 there: no NaN, forward or backward."""
  q, k, v = arrays()
  position, conv, bias = parameters()
  q = -jnp.abs(q)
  out, _ = run(q, k, v, (position, conv, bias), None, causal)
  empty = oracles.sla(
    q, k, v, position, conv, bias, causal=causal, segments=segments(None)
  )
  oracles.check_close(out, empty)

  def loss(*x):
    return run(*x, (position, conv, bias), None, causal)[0].sum()

  for grad in jax.grad(loss, (0, 1, 2))(q, k, v):
    assert np.isfinite(np.asarray(grad)).all()


def test_bf16_sums_do_not_stop_growing():
  """1024 equal keys: a bf16 sum would stay at 256 and the mean be wrong."""
  ones = jnp.ones((1, 1024, 1, 2), jnp.bfloat16)
  v = jnp.arange(1024).reshape(1, -1, 1, 1).astype(jnp.bfloat16)
  out = linear_attention(ones, ones, v, causal=True)
  want = np.cumsum(np.asarray(v, np.float64)[0, :, 0, 0])
  want /= np.arange(1, 1025)
  got = np.asarray(out, np.float64)[0, :, 0, 0]
  np.testing.assert_allclose(got, want, 1e-2, 1e-2)


def test_positions_beyond_the_table_share_its_last_row():
  """And the bias is that of the position in the document, before the ReLU."""
  args, seg = arrays(), documents()
  position, conv, bias = parameters()
  longer = jnp.concatenate([position, jnp.repeat(position[-1:], T - P, 0)])
  short = run(*args, (position, conv, bias), seg, True)[0]
  long = run(*args, (longer, conv, bias), seg, True)[0]
  np.testing.assert_array_equal(short, long)
  moved = run(*args, (position[::-1], conv, bias), seg, True)[0]
  assert np.abs(moved - short).max() > 1e-2


@pytest.mark.parametrize('cut', [False, True])
def test_decoding_equals_prefill_token_by_token(cut):
  q, k, v = arrays()
  given = parameters()
  seg = documents() if cut else None
  want, _ = run(q, k, v, given, seg, True)
  ids = segments(seg)
  new = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  state = module.empty_state(B, K, H, HV, v.dtype)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  step = jax.jit(functools.partial(module.step, learned=learned(*given)))
  got = []
  for t in range(T):
    at = slice(t, t + 1)
    begins = jnp.asarray(new[:, t]) if cut else None
    out, state = step(state, q[:, at], k[:, at], v[:, at], new_document=begins)
    got.append(out)
  oracles.check_close(jnp.concatenate(got, 1), want)
  assert sum(x.nbytes for x in jax.tree.leaves(state)) == size


def test_in_a_model_every_parameter_learns_and_no_token_sees_the_future():
  config = ModelConfig(
    num_layers=2,
    d_model=16,
    num_heads=N,
    num_kv_heads=K,
    mlp_dim=24,
    attention=AttentionConfig('sla', sla=SlaConfig(positions=P)),
  )
  graphdef, params = nnx.split(DecoderLM(config, 30, rngs=nnx.Rngs(0)))

  @functools.partial(jax.jit, static_argnums=2)
  def total(params, tokens, upto):
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, context=AttentionContext(step=0, train=True)).hidden
    return (hidden[:, :upto] ** 3).sum(), hidden

  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (B, T)))
  grads, _ = jax.grad(total, has_aux=True)(params, tokens, T)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(np.asarray(grad)).max() > 0, jax.tree_util.keystr(path)
  found = {
    sharding.axis_names(path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      nnx.to_pure_dict(params)
    )
  }
  assert ('taps', 'head_dim') in found
  other = tokens.at[:, 9:].set((tokens[:, 9:] + 1) % 30)
  (_, hidden), (_, moved) = (total(params, x, T) for x in (tokens, other))
  np.testing.assert_array_equal(moved[:, :9], hidden[:, :9])
  assert not np.array_equal(moved[:, 9:], hidden[:, 9:])


def test_the_module_makes_what_the_function_takes():
  config = ModelConfig(
    d_model=24,
    num_heads=N,
    num_kv_heads=K,
    attention=AttentionConfig('sla', sla=SlaConfig(positions=P)),
  )
  made = SlaParameters(config, rngs=nnx.Rngs(0))
  given = made(jnp.zeros((B, T, 24)), rope=None)
  assert given.heads['position'].shape == (B, P, K, H)
  assert (given.heads['position'] == 0).all()
  assert given.weights['conv'].shape == (5, H)
  assert float(jnp.abs(given.weights['conv']).max()) > 0
