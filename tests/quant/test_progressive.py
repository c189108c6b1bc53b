"""Progressive quantisation: schedule, rounding, gradient, and the model."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.rotary import rotary
from psa_jax.config import ModelConfig, NormConfig, QuantConfig
from psa_jax.models.blocks import FeedForward
from psa_jax.quant.progressive import FULL, Quantizer, bits_at, fake_quantize
from tests.train import tiny

QUANT = QuantConfig(
  enabled=True, levels=(8, 4, 2), warmup_steps=3, quantization_interval=2
)
ALL = dataclasses.replace(QUANT, weights=True, activations=True)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(x, bits, axes):
  """The definition group by group, in float64."""
  x = np.asarray(x, np.float64)
  axes = tuple(range(x.ndim)) if axes is None else axes
  rest = [i for i in range(x.ndim) if i not in [a % x.ndim for a in axes]]
  y = np.zeros_like(x)
  for at in np.ndindex(*(x.shape[i] for i in rest)):
    index = [slice(None)] * x.ndim
    for i, n in zip(rest, at, strict=True):
      index[i] = n
    group = x[tuple(index)]
    step = np.abs(group).max() / (2 ** (bits - 1) - 1)
    y[tuple(index)] = np.rint(group / step) * step if step else 0
  return y


@pytest.mark.parametrize('axes', [None, (-1,), (1, 2), (0,)])
@pytest.mark.parametrize('bits', [2, 3, 4, 8, 16])
def test_rounding_equals_the_definition(bits, axes):
  x = normal(3, 4, 6)
  x[0, 1] = 0
  got = fake_quantize(jnp.asarray(x), bits, axes=axes)
  np.testing.assert_allclose(got, rounded(x, bits, axes), rtol=1e-5, atol=1e-6)


@pytest.mark.tier('default')
@hypothesis.given(
  st.integers(2, 16),
  st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
)
def test_error_is_at_most_half_a_step(bits, values):
  x = np.asarray(values, np.float32)
  got = np.asarray(fake_quantize(jnp.asarray(x), bits), np.float64)
  step = np.abs(np.float64(x)).max() / (2 ** (bits - 1) - 1)
  assert (np.abs(got - x) <= step * (0.5 + 1e-2) + 1e-37).all()
  # No value leaves the range, and the largest stays (to rounding in f32).
  top = np.abs(x).max()
  assert np.abs(got).max() == pytest.approx(top, rel=1e-6)
  codes = got / step if step else got
  assert np.abs(codes - np.rint(codes)).max() < 1e-2


def test_full_precision_is_the_argument_itself():
  x = jnp.asarray(normal(5, 7))
  np.testing.assert_array_equal(fake_quantize(x, FULL), x)
  half = x.astype(jnp.bfloat16)
  np.testing.assert_array_equal(
    np.asarray(fake_quantize(half, FULL), np.float32),
    np.asarray(half, np.float32),
  )


def test_low_precision_inputs_keep_their_dtype():
  x = jnp.asarray(normal(5, 7), jnp.bfloat16)
  got = fake_quantize(x, 4, axes=(1,))
  assert got.dtype == jnp.bfloat16
  want = rounded(np.asarray(x, np.float64), 4, (1,))
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


@pytest.mark.tier('default')
@pytest.mark.parametrize('bits', [2, 8, FULL])
def test_the_gradient_passes_straight_through(bits):
  x, weight = jnp.asarray(normal(5, 7)), jnp.asarray(normal(5, 7, seed=1))

  def loss(x):
    return (jnp.sin(fake_quantize(x, bits, axes=(1,))) * weight).sum()

  got = jax.jit(jax.grad(loss))(x)
  want = np.cos(fake_quantize(x, bits, axes=(1,))) * weight
  np.testing.assert_allclose(got, want, rtol=1e-5)
  tangent = jax.jvp(lambda x: fake_quantize(x, bits), (x,), (weight,))[1]
  np.testing.assert_array_equal(tangent, weight)


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  ('warmup', 'want'),
  [
    (3, [32, 32, 32, 8, 8, 4, 4, 2, 2, 2]),
    (0, [8, 8, 4, 4, 2, 2, 2, 2, 2, 2]),
    (1, [32, 8, 8, 4, 4, 2, 2, 2, 2, 2]),
  ],
)
def test_one_level_fewer_at_each_boundary(warmup, want):
  config = dataclasses.replace(QUANT, warmup_steps=warmup)
  assert [int(bits_at(config, step)) for step in range(10)] == want
  assert int(bits_at(config, 2**31 - 1)) == 2


def test_one_level_is_reached_and_kept():
  config = dataclasses.replace(QUANT, levels=(6,), warmup_steps=2)
  assert [int(bits_at(config, step)) for step in range(5)] == [32, 32, 6, 6, 6]


def test_evaluation_has_the_bits_of_its_step_or_its_own():
  for step in range(10):
    assert bits_at(QUANT, step, train=False) == bits_at(QUANT, step)
  own = dataclasses.replace(QUANT, eval_bits=5)
  assert [int(bits_at(own, 0, train=t)) for t in (False, True)] == [5, 32]


def test_default_intervals_are_those_of_the_specification():
  assert 1000 <= QuantConfig().quantization_interval <= 5000
  assert not QuantConfig().enabled


def test_bits_are_traced():
  traces = []

  @jax.jit
  def run(step, x):
    traces.append(1)
    bits = bits_at(QUANT, step)
    return fake_quantize(x, bits, axes=(1,))

  x = jnp.asarray(normal(4, 6))
  for step in range(10):
    bits = int(bits_at(QUANT, step))
    want = x if bits == FULL else rounded(x, bits, (1,))
    np.testing.assert_allclose(run(jnp.int32(step), x), want, rtol=1e-5)
  assert len(traces) == 1


# What the layers quantise.

MODEL = ModelConfig(
  num_layers=3, d_model=24, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20
)


def table(length):
  return rotary(jnp.arange(length)[None], head_dim=6, theta=100.0)


def attention_layer(quant, **changes):
  config = dataclasses.replace(MODEL, quant=quant, **changes)
  return SelfAttention(config, rngs=nnx.Rngs(0))


def oracle_layer(layer, x, quant, bits):
  """The layer in NumPy float64, from the definition of what is rounded."""
  w = {n: np.asarray(getattr(layer, n)[...]) for n in ('wq', 'wk', 'wv', 'wo')}
  fold = {name: (0,) for name in w} | {'wo': (0, 1)}
  if quant.weights:
    w = {name: rounded(value, bits, fold[name]) for name, value in w.items()}
  read = rounded(x, bits, (2,)) if quant.activations else x
  rope = [np.asarray(a, np.float64)[:, :, None] for a in table(x.shape[1])]

  def turn(y):
    a, b = np.split(y, 2, -1)
    cos, sin = rope
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  axes = (3,) if quant.granularity == 'head' else (2, 3)
  q, k = (turn(np.einsum('btd,dnh->btnh', read, w[n])) for n in ('wq', 'wk'))
  v = np.einsum('btd,dnh->btnh', read, w['wv'])
  q, k, v = (rounded(y, bits, axes) for y in (q, k, v))
  out = np.zeros_like(q)
  for b, t, n in np.ndindex(q.shape[:3]):
    score = k[b, : t + 1, n // 2] @ q[b, t, n] / np.sqrt(q.shape[-1])
    p = np.exp(score - score.max())
    out[b, t, n] = p @ v[b, : t + 1, n // 2] / p.sum()
  if quant.activations:
    out = rounded(out, bits, (2, 3))
  return np.einsum('btnh,nhd->btd', out, w['wo'])


@pytest.mark.tier('default')
@pytest.mark.parametrize('granularity', ['head', 'token'])
@pytest.mark.parametrize('quant', [QUANT, ALL], ids=['qkv', 'all'])
def test_the_layer_quantises_what_is_asked_for(quant, granularity):
  quant = dataclasses.replace(quant, granularity=granularity)
  layer, x = attention_layer(quant), normal(2, 9, 24)
  y, aux = layer(
    jnp.asarray(x), context=AttentionContext(step=5, rope=table(9), train=True)
  )
  assert aux['bits'] == 4 and aux['bits'].dtype == jnp.float32
  want = oracle_layer(layer, x, quant, 4)
  # A value between two points of the grid may fall to either in f32.
  near = np.isclose(y, want, rtol=1e-3, atol=1e-4).mean()
  assert near > 0.97
  plain = attention_layer(QuantConfig())(
    jnp.asarray(x), context=AttentionContext(step=5, rope=table(9))
  )[0]
  assert not np.isclose(plain, want, rtol=1e-3, atol=1e-4).mean() > 0.5


@pytest.mark.tier('default')
def test_the_feed_forward_layer_quantises_weights_and_inputs():
  mlp, x = FeedForward(MODEL, rngs=nnx.Rngs(0)), normal(2, 5, 24)
  got = mlp(jnp.asarray(x), Quantizer.at(ALL, 3, train=True))
  w = {
    name: rounded(getattr(mlp, name)[...], 8, (0,))
    for name in ('w_gate', 'w_up', 'w_down')
  }
  read = rounded(x, 8, (2,))
  gate, up = read @ w['w_gate'], read @ w['w_up']
  inner = rounded(gate / (1 + np.exp(-gate)) * up, 8, (2,))
  np.testing.assert_allclose(got, inner @ w['w_down'], rtol=2e-2, atol=2e-3)
  np.testing.assert_array_equal(
    mlp(jnp.asarray(x), Quantizer.at(QUANT, 3, train=True)), mlp(jnp.asarray(x))
  )


@pytest.mark.tier('default')
def test_no_token_sees_the_size_of_a_later_one():
  """A scale over the sequence would; no gradient shows it."""
  layer = attention_layer(ALL)
  run = jax.jit(
    lambda x: layer(
      x, context=AttentionContext(step=jnp.int32(7), rope=table(9), train=True)
    )[0]
  )
  x = normal(2, 9, 24)
  other = x.copy()
  other[:, 6:] *= 50
  want, got = run(jnp.asarray(x)), run(jnp.asarray(other))
  np.testing.assert_array_equal(got[:, :6], want[:, :6])
  assert not np.array_equal(got[:, 6:], want[:, 6:])


@pytest.mark.parametrize(('dtype', 'full'), [('float32', 32), ('bfloat16', 16)])
def test_the_bits_that_are_reported(dtype, full):
  layer = attention_layer(QUANT)
  x = jnp.asarray(normal(1, 4, 24), dtype)

  @jax.jit
  def bits(step):
    return layer(
      x, context=AttentionContext(step=step, rope=table(4), train=True)
    )[1]['bits']

  got = [int(bits(jnp.int32(step))) for step in (0, 2, 3, 5, 100)]
  assert got == [full, full, 8, 4, 2]


@pytest.mark.tier('default')
def test_nothing_is_reported_when_it_is_off():
  layer = attention_layer(QuantConfig())
  x = jnp.asarray(normal(1, 4, 24))
  assert (
    'bits'
    not in layer(
      x, context=AttentionContext(step=0, rope=table(4), train=True)
    )[1]
  )


# A whole train step.


@functools.cache
def steps(quant, accumulate=1, scan=True, remat='none', **mesh):
  config = tiny.config(NormConfig(), accumulate=accumulate, **mesh)
  model = dataclasses.replace(
    config.model, quant=quant, scan_layers=scan, remat=remat
  )
  return tiny.Steps(dataclasses.replace(config, model=model))


def run(made, count=1, state=None):
  state, found = state or made.init(), []
  for i in range(count):
    state, metrics = made.train_step(state, made.batch(first=8 * i))
    found.append(tiny.host(metrics))
  return state, found


@pytest.mark.tier('default')
def test_full_precision_is_bit_identical_to_no_quantisation():
  state, found = run(steps(ALL), 2)
  plain, want = run(steps(QuantConfig()), 2)
  for got in found:
    assert got.pop('bits') == 32
  tiny.assert_identical(found, want)
  tiny.assert_identical(state, plain)


def test_the_run_reports_its_bits_and_compiles_once():
  made = steps(ALL)
  _, found = run(made, 9)
  assert [int(m['bits']) for m in found] == [32, 32, 32, 8, 8, 4, 4, 2, 2]
  assert all(np.isfinite(m['loss']) and m['grad_norm'] > 0 for m in found)
  assert made.train_step.jitted._cache_size() == 1


@pytest.mark.tier('default')
def test_evaluation_reads_the_bits_of_the_state():
  made = steps(ALL)
  state = made.init()
  bits, losses = [], []
  for step in (2, 3, 5):
    loss = made.eval_step(state._replace(step=jnp.int32(step)), made.batch())
    bits.append(int(loss.means['bits']))
    losses.append(float(loss.total))
  assert bits == [32, 8, 4]
  assert len(set(losses)) == 3


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  'other',
  [
    dict(accumulate=2, remat='full', data=2, fsdp=2, tensor=2),
    dict(scan=False, remat='attention'),
  ],
  ids=str,
)
def test_scan_remat_accumulation_and_mesh_change_nothing(other):
  """At 4 bits, of weights and activations too."""
  (got,), (want,) = (
    run(made, state=made.init()._replace(step=jnp.int32(5)))[1]
    for made in (steps(ALL, **other), steps(ALL))
  )
  assert got['bits'] == want['bits'] == 4
  assert got['loss'] == pytest.approx(want['loss'], rel=1e-4)
  assert got['grad_norm'] == pytest.approx(want['grad_norm'], rel=1e-2)
