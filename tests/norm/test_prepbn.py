"""Every norm arm against a NumPy float64 oracle, and what statistics do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from psa_jax.config import ConfigError, NormConfig
from psa_jax.norm import Norm, gamma
from tests import tiers

KINDS = ('rmsnorm', 'layernorm', 'batchnorm', 'repbn', 'prepbn')
BATCH_KINDS = KINDS[2:]
DIM = 6
CONFIG = NormConfig(
  kind='prepbn', warmup_steps=2, decay_steps=8, scale_init=1.0, eta_init=1.0
)
# Neither is small beside the variance, so that taking one for the other shows.
EPSILONS = dict(base_eps=0.1, bn_eps=0.4)


def make_norm(kind='prepbn', seed=0, dim=DIM, **changes):
  """A layer with random parameters and statistics."""
  config = dataclasses.replace(CONFIG, kind=kind, **EPSILONS | changes)
  norm = Norm(dim, config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(seed)
  state = nnx.as_pure(nnx.state(norm))
  random = {
    name: jnp.asarray(0.5 + rng.random(value.shape), value.dtype)
    for name, value in sorted(state.items())
  }
  nnx.update(norm, random)
  return norm


def inputs(seed=1, shape=(3, 5, DIM)):
  rng = np.random.default_rng(seed)
  return (2 * rng.standard_normal(shape) + 0.7).astype(np.float32)


def some_mask():
  mask = np.ones((3, 5), np.float32)
  mask[0, 3:] = 0
  mask[2] = [0, 1, 0, 0, 1]
  return mask


def as_jax(mask):
  return None if mask is None else jnp.asarray(mask)


def arrays(norm):
  state = nnx.as_pure(nnx.state(norm))
  return {name: np.asarray(value, np.float64) for name, value in state.items()}


def statistics(norm):
  return np.asarray(norm.mean[...]), np.asarray(norm.var[...])


def oracle(p, x, config, *, weight, train, mask=None):
  """The docstring's equations in NumPy, token by token where it can be."""
  x = x.astype(np.float64)
  tokens = x.reshape(-1, x.shape[-1])
  base_kind = config.base if config.kind == 'prepbn' else config.kind

  def base(token):
    if base_kind == 'layernorm':
      centred = token - token.mean()
      scale = np.sqrt(centred.var() + config.base_eps)
      return centred / scale * p['scale'] + p['bias']
    return token / np.sqrt((token**2).mean() + config.base_eps) * p['scale']

  if config.kind in ('rmsnorm', 'layernorm'):
    return np.stack([base(t) for t in tokens]).reshape(x.shape)
  mean, var = p['mean'], p['var']
  if train and config.statistics == 'batch':
    counted = tokens if mask is None else tokens[mask.reshape(-1) > 0]
    mean, var = counted.mean(0), counted.var(0)
  y = (tokens - mean) / np.sqrt(var + config.bn_eps) * p['bn_scale'] + p[
    'bn_bias'
  ]
  if config.kind != 'batchnorm':
    y = y + p['eta'] * tokens
  if config.kind == 'prepbn':
    y = weight * np.stack([base(t) for t in tokens]) + (1 - weight) * y
  return y.reshape(x.shape)


def slope(function, value, h=1e-5):
  """Central differences of a scalar function, in float64."""
  grad = np.zeros_like(value, np.float64)
  for index in np.ndindex(value.shape):
    ends = []
    for sign in (1, -1):
      moved = value.astype(np.float64)
      moved[index] += sign * h
      ends.append(function(moved))
    grad[index] = (ends[0] - ends[1]) / (2 * h)
  return grad


MODES = [
  ('batch', True, None),
  ('batch', True, some_mask()),
  ('running', True, some_mask()),
  ('batch', False, None),
]


@pytest.mark.parametrize('statistics, train, mask', MODES)
@pytest.mark.parametrize(
  'kind', tiers.cases([*KINDS, 'prepbn-layernorm'], quick=['prepbn'])
)
def test_value_and_gradient_equal_the_oracle(kind, statistics, train, mask):
  kind, _, base = kind.partition('-')
  norm = make_norm(kind, statistics=statistics, base=base or 'rmsnorm')
  x, step, weight = inputs(), 5, 1 - 3 / 8
  p, config = arrays(norm), norm.config
  towards = np.random.default_rng(2).standard_normal(x.shape)
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)
  pure = nnx.as_pure(params)

  @jax.jit
  def run(params, x):
    layer = nnx.merge(graphdef, params, nnx.as_pure(stats))
    y = layer(x, step=jnp.int32(step), train=train, mask=as_jax(mask))
    return jnp.sum(y * jnp.asarray(towards, jnp.float32)), y

  (_, y), (grads, grad_x) = jax.value_and_grad(run, (0, 1), has_aux=True)(
    pure, jnp.asarray(x)
  )
  how = dict(weight=weight, train=train, mask=mask)
  want = oracle(p, x, config, **how)
  np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)

  def loss(p, x):
    return np.sum(oracle(p, x, config, **how) * towards)

  want_x = slope(lambda v: loss(p, v), x)
  np.testing.assert_allclose(grad_x, want_x, rtol=2e-4, atol=2e-5)
  assert set(grads) == set(p) - {'mean', 'var'}
  for name, got in grads.items():
    want = slope(lambda v, name=name: loss({**p, name: v}, x), p[name])
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.tier('default')
@pytest.mark.parametrize('statistics', ['batch', 'running'])
@pytest.mark.parametrize('mask', [None, some_mask()])
@pytest.mark.parametrize('step', [0, 5, 100])
@pytest.mark.parametrize('kind', BATCH_KINDS)
def test_statistics_move_in_training_only(kind, step, mask, statistics):
  norm, x = make_norm(kind, statistics=statistics), inputs()
  before = arrays(norm)
  norm(jnp.asarray(x), step=step, train=False, mask=as_jax(mask))
  assert all(np.array_equal(arrays(norm)[n], before[n]) for n in before)
  norm(jnp.asarray(x), step=step, train=True, mask=as_jax(mask))
  after = arrays(norm)
  tokens = x.reshape(-1, DIM).astype(np.float64)
  if mask is not None:
    tokens = tokens[mask.reshape(-1) > 0]
  unbiased = tokens.var(0, ddof=1)
  for name, batch in (('mean', tokens.mean(0)), ('var', unbiased)):
    want = 0.9 * before.pop(name) + 0.1 * batch
    np.testing.assert_allclose(after[name], want, rtol=1e-5)
  assert all(np.array_equal(after[n], before[n]) for n in before)


def test_epsilons_and_variances_are_those_of_the_papers_code():
  """SLAB: LayerNorm 1e-6, BatchNorm1d 1e-5, its running variance unbiased."""
  assert (NormConfig().base_eps, NormConfig().bn_eps) == (1e-6, 1e-5)
  x = inputs(shape=(1, 3, DIM)) * 1e-3  # epsilons show beside such variances
  rows = x[0].astype(np.float64)
  layer = make_norm('layernorm', base_eps=1e-6)
  layer.scale[...], layer.bias[...] = jnp.ones(DIM), jnp.zeros(DIM)
  want = rows - rows.mean(1, keepdims=True)
  want /= np.sqrt(rows.var(1, keepdims=True) + 1e-6)
  got = layer(jnp.asarray(x), step=0, train=True)[0]
  np.testing.assert_allclose(got, want, 1e-4, 1e-6)
  batch = make_norm('batchnorm', bn_eps=1e-5)
  batch.bn_scale[...], batch.bn_bias[...] = jnp.ones(DIM), jnp.zeros(DIM)
  before = np.asarray(batch.var[...])
  want = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
  got = batch(jnp.asarray(x), step=0, train=True)[0]
  np.testing.assert_allclose(got, want, 1e-4, 1e-6)
  moved = 0.9 * before + 0.1 * rows.var(0, ddof=1)
  np.testing.assert_allclose(batch.var[...], moved, 1e-6)
  # One token has no unbiased variance: the running one stays.
  kept = np.asarray(batch.var[...])
  batch(jnp.asarray(x[:, :1]), step=0, train=True)
  np.testing.assert_array_equal(batch.var[...], kept)


@pytest.mark.tier('default')
def test_every_micro_batch_moves_the_statistics():
  norm, x = make_norm(), inputs()
  mean = arrays(norm)['mean']
  for rows in x:
    norm(jnp.asarray(rows[None]), step=3, train=True)
    mean = 0.9 * mean + 0.1 * rows.astype(np.float64).mean(0)
  np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)


def test_gamma_follows_the_step_in_training_and_evaluation():
  x = jnp.asarray(inputs())
  norm = make_norm(statistics='running')
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)
  pure, traces = nnx.as_pure((params, stats)), []

  def run(step, train):
    traces.append(None)
    return nnx.merge(graphdef, *pure)(x, step=step, train=train)

  run = jax.jit(run, static_argnums=1)
  p = arrays(norm)
  trace = [1, 1, 1, *(1 - i / 8 for i in range(1, 9)), 0, 0]
  for step, weight in enumerate(trace):
    want = oracle(p, np.asarray(x), norm.config, weight=weight, train=False)
    assert gamma(norm.config, step) == np.float32(weight)
    for train in (False, True):
      got = run(jnp.int32(step), train)
      np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
  assert len(traces) == 2


def test_many_forwards_of_one_step_do_not_move_gamma():
  norm, x = make_norm(statistics='running'), jnp.asarray(inputs())
  first = norm(x, step=4, train=False)
  for _ in range(20):
    norm(x, step=4, train=True)
  stats = arrays(norm)
  again = norm(x, step=4, train=False)
  want = oracle(stats, np.asarray(x), norm.config, weight=0.75, train=False)
  np.testing.assert_allclose(again, want, rtol=2e-5, atol=2e-5)
  assert not np.allclose(first, again)


def test_gamma_one_is_the_base_norm_exactly():
  for base in ('rmsnorm', 'layernorm'):
    x, mixed = jnp.asarray(inputs()), make_norm(base=base)
    alone = make_norm(base)
    alone.scale[...] = mixed.scale[...]
    if base == 'layernorm':
      alone.bias[...] = mixed.bias[...]
    for step in (0, 2):
      np.testing.assert_array_equal(
        mixed(x, step=step, train=True), alone(x, step=step, train=True)
      )


@pytest.mark.tier('default')
@pytest.mark.parametrize('base', ['rmsnorm', 'layernorm'])
def test_gamma_zero_does_not_depend_on_the_base_norm(base):
  x, norm, rep = jnp.asarray(inputs()), make_norm(base=base), make_norm('repbn')
  for name in ('bn_scale', 'bn_bias', 'eta', 'mean', 'var'):
    getattr(rep, name)[...] = getattr(norm, name)[...]
  before = norm(x, step=10, train=False)
  norm.scale[...] = norm.scale[...] * -3 + 1
  if base == 'layernorm':
    norm.bias[...] = norm.bias[...] + 7
  np.testing.assert_array_equal(norm(x, step=10, train=False), before)
  np.testing.assert_array_equal(rep(x, step=10, train=False), before)
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  def loss(params):
    layer = nnx.merge(graphdef, params, nnx.as_pure(stats))
    return jnp.sum(layer(x, step=10, train=False) ** 2)

  grads = jax.grad(loss)(nnx.as_pure(params))
  assert not np.any(grads['scale']) and np.all(grads['bn_scale'] != 0)


@pytest.mark.parametrize('train', [True, False])
def test_repbn_is_a_batch_norm(train):
  """RepBN(x; a, b) = BN(x; a + eta sigma, b + eta mu): SLAB's lemma."""
  x, rep, plain = inputs(), make_norm('repbn'), make_norm('batchnorm')
  mean, var = statistics(rep)
  plain.mean[...], plain.var[...] = rep.mean[...], rep.var[...]
  if train:
    mean, var = x.reshape(-1, DIM).mean(0), x.reshape(-1, DIM).var(0)
  sigma, eta = np.sqrt(var + rep.config.bn_eps), np.asarray(rep.eta[...])
  plain.bn_scale[...] = rep.bn_scale[...] + eta * sigma
  plain.bn_bias[...] = rep.bn_bias[...] + eta * mean
  x = jnp.asarray(x)
  np.testing.assert_allclose(
    rep(x, step=0, train=train),
    plain(x, step=0, train=train),
    rtol=1e-5,
    atol=1e-5,
  )


def test_a_decoder_starts_as_its_base_and_repbn_as_zero():
  config = NormConfig(kind='prepbn', decay_steps=4)
  norm, x = Norm(DIM, config, rngs=nnx.Rngs(0)), jnp.asarray(inputs())
  rms = Norm(DIM, NormConfig(), rngs=nnx.Rngs(0))
  want = rms(x, step=0, train=True)
  np.testing.assert_array_equal(norm(x, step=0, train=True), want)
  np.testing.assert_array_equal(norm(x, step=2, train=True), 0.5 * want)
  assert not np.any(norm(x, step=4, train=True))


def test_jit_that_returns_the_state_equals_eager():
  norm, x = make_norm(), jnp.asarray(inputs())
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  @jax.jit
  def train(params, stats):
    layer = nnx.merge(graphdef, params, stats)
    y = layer(x, step=3, train=True)
    return y, nnx.as_pure(nnx.state(layer, nnx.BatchStat))

  old = nnx.as_pure(stats)
  y, new = train(nnx.as_pure(params), old)
  want = norm(x, step=3, train=True)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  for name in ('mean', 'var'):
    assert not np.array_equal(new[name], old[name])
    np.testing.assert_allclose(new[name], arrays(norm)[name], rtol=1e-6)


def test_jit_that_keeps_the_state_to_itself_is_caught():
  norm, x = make_norm(), jnp.asarray(inputs())
  before = statistics(norm)
  with pytest.raises(Exception, match='[Tt]race'):
    jax.jit(lambda x: norm(x, step=3, train=True))(x)
  np.testing.assert_array_equal(statistics(norm), before)


@pytest.mark.parametrize('statistics', ['batch', 'running'])
@pytest.mark.parametrize('kind', BATCH_KINDS)
def test_what_the_mask_leaves_out_has_no_influence(kind, statistics):
  mask, outputs = some_mask(), []
  for garbage in (0.0, 1e30, np.nan, np.inf):
    norm, x = make_norm(kind, statistics=statistics), inputs()
    x[mask == 0] = garbage
    y = norm(jnp.asarray(x), step=5, train=True, mask=jnp.asarray(mask))
    outputs.append((np.asarray(y)[mask > 0], *arrays(norm).values()))
  for other in outputs[1:]:
    for got, want in zip(other, outputs[0], strict=True):
      np.testing.assert_array_equal(got, want)


@pytest.mark.tier('default')
@pytest.mark.parametrize('statistics', ['batch', 'running'])
@pytest.mark.parametrize('kind', BATCH_KINDS)
def test_what_the_mask_leaves_out_has_no_influence_on_gradients(
  kind, statistics
):
  """Where nothing depends on it; and a NaN stays one in its own row."""
  mask, found = some_mask(), []
  for garbage in (0.0, np.nan, np.inf):
    norm, x = make_norm(kind, statistics=statistics), inputs()
    x[mask == 0] = garbage
    graphdef, params, rest = nnx.split(norm, nnx.Param, ...)

    def total(params, x, graphdef=graphdef, rest=rest):
      norm = nnx.merge(graphdef, params, rest, copy=True)
      y = norm(x, step=5, train=True, mask=jnp.asarray(mask))
      kept = jnp.where(mask[..., None] > 0, y, 0)
      return (kept * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    grads, y = jax.grad(total, (0, 1), has_aux=True)(params, jnp.asarray(x))
    finite = np.isfinite(np.asarray(y)[mask == 0])
    assert finite.all() if garbage == 0 else not finite.any()
    found.append(jax.tree.map(np.asarray, nnx.as_pure(grads)))
  for other in found[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, found[0])


@pytest.mark.tier('default')
def test_a_masked_batch_equals_the_batch_without_padding():
  x, rows = inputs(), []
  padded = np.concatenate([x, np.full((3, 4, DIM), 9, np.float32)], axis=1)
  mask = np.arange(9)[None].repeat(3, 0) < 5
  for values, kwargs in ((x, {}), (padded, {'mask': jnp.asarray(mask)})):
    norm = make_norm()
    y = norm(jnp.asarray(values), step=5, train=True, **kwargs)
    rows.append((np.asarray(y)[:, :5], *statistics(norm)))
  for a, b in zip(*rows, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.tier('default')
@pytest.mark.parametrize('kind', BATCH_KINDS)
def test_a_mask_without_tokens_moves_nothing_and_stays_finite(kind):
  norm, x = make_norm(kind), jnp.asarray(inputs())
  mask = jnp.zeros((3, 5), bool)
  before = statistics(norm)
  want = norm(x, step=5, train=False)
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  def loss(params, x):
    layer = nnx.merge(graphdef, params, nnx.as_pure(stats))
    return jnp.sum(layer(x, step=5, train=True, mask=mask) ** 2)

  grads = jax.grad(loss, (0, 1))(nnx.as_pure(params), x)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
  got = norm(x, step=5, train=True, mask=mask)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_array_equal(statistics(norm), before)


@pytest.mark.parametrize('kind', ['repbn', 'prepbn'])
def test_running_statistics_do_not_leak_the_future_and_batch_ones_do(kind):
  early = {}
  for mode in ('running', 'batch'):
    early[mode] = []
    for later in (0.0, 5.0):
      x = inputs(shape=(1, 9, DIM))
      x[:, 4:] += later
      norm = make_norm(kind, statistics=mode)
      y = norm(jnp.asarray(x), step=5, train=True)
      early[mode].append(np.asarray(y)[:, :4])
  np.testing.assert_array_equal(*early['running'])
  assert np.abs(np.subtract(*early['batch'])).max() > 0.1


def run_sharded(x, mask, sharding):
  norm = make_norm()
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  @jax.jit
  def train(params, stats, x, mask):
    def loss(params):
      layer = nnx.merge(graphdef, params, stats)
      y = layer(x, step=5, train=True, mask=mask)
      stats_now = nnx.as_pure(nnx.state(layer, nnx.BatchStat))
      return jnp.sum(jnp.sin(y)), (y, stats_now)

    return jax.grad(loss, has_aux=True)(params)

  state = nnx.as_pure((params, jax.tree.map(jnp.copy, stats)))
  if sharding is not None:
    state = jax.device_put(state, NamedSharding(sharding.mesh, P()))
    x, mask = jax.device_put((x, mask), sharding)
  return train(*state, x, mask)


@pytest.mark.tier('default')
def test_eight_devices_equal_one():
  assert len(jax.devices()) >= 8
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  x = inputs(shape=(8, 5, DIM))
  # Shard means differ a lot: statistics per device would be far off.
  x += np.arange(8, dtype=np.float32)[:, None, None]
  mask = np.random.default_rng(3).random((8, 5)) < 0.6
  mask[0] = False
  one = run_sharded(jnp.asarray(x), jnp.asarray(mask), None)
  many = run_sharded(x, mask, NamedSharding(mesh, P('data')))
  for got, want in zip(
    jax.tree.leaves(many), jax.tree.leaves(one), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_large_offset_does_not_cost_the_variance():
  norm = make_norm('batchnorm', momentum=0.0)
  x = inputs(shape=(64, 64, DIM)) + 3000
  norm(jnp.asarray(x), step=0, train=True)
  want = x.astype(np.float64).reshape(-1, DIM).var(0, ddof=1)
  np.testing.assert_allclose(norm.var[...], want, rtol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_bf16_activations_are_normalised_in_f32(kind):
  norm, x = make_norm(kind), inputs().astype(jnp.bfloat16)
  y = norm(jnp.asarray(x), step=5, train=True)
  assert y.dtype == jnp.bfloat16
  wide = make_norm(kind)(jnp.asarray(x, jnp.float32), step=5, train=True)
  np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
  dtypes = {value.dtype for value in nnx.as_pure(nnx.state(norm)).values()}
  assert dtypes == {jnp.dtype('float32')}


def test_statistics_stay_f32_under_bf16_parameters():
  norm = Norm(DIM, CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  norm(jnp.asarray(inputs()), step=5, train=True)
  dtypes = {n: v.dtype.name for n, v in nnx.as_pure(nnx.state(norm)).items()}
  assert {dtypes.pop('mean'), dtypes.pop('var')} == {'float32'}
  assert set(dtypes.values()) == {'bfloat16'}


def test_each_kind_has_its_own_parameters_and_no_others():
  batch = {'bn_scale', 'bn_bias', 'mean', 'var'}
  want = {
    'rmsnorm': {'scale'},
    'layernorm': {'scale', 'bias'},
    'batchnorm': batch,
    'repbn': batch | {'eta'},
    'prepbn': batch | {'eta', 'scale'},
  }
  assert {kind: set(arrays(make_norm(kind))) for kind in KINDS} == want
  assert 'bias' in arrays(make_norm(base='layernorm'))
  assert make_norm('repbn').eta[...].shape == ()


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(kind='groupnorm'), "kind: unknown 'groupnorm'"),
    (dict(momentum=1.0), 'momentum'),
    (dict(base_eps=0.0), 'base_eps'),
    (dict(bn_eps=0.0), 'bn_eps'),
    (dict(decay_steps=-1), 'must be at least 0'),
    (dict(kind='batchnorm', scale_init=0.0), 'scale_init=1'),
    (dict(kind='repbn', scale_init=0.0, eta_init=0.0), 'scale_init=1'),
    (
      dict(scale_init=0.0, eta_init=0.0, warmup_steps=0, decay_steps=0),
      'scale_init=1',
    ),
  ],
)
def test_an_impossible_norm_is_refused(change, words):
  with pytest.raises(ConfigError, match=words):
    Norm(DIM, dataclasses.replace(CONFIG, **change), rngs=nnx.Rngs(0))


def test_a_mask_of_another_shape_is_refused():
  with pytest.raises((ValueError, TypeError), match='mask'):
    make_norm()(
      jnp.asarray(inputs()), step=0, train=True, mask=jnp.ones((3, 4))
    )


@pytest.mark.parametrize('kind', ['rmsnorm', 'layernorm'])
def test_a_row_that_overflows_is_nan_and_not_0(kind):
  """Its squares are past f32: 0 would look like a sound answer."""
  layer = Norm(4, NormConfig(kind=kind), rngs=nnx.Rngs(0))
  x = jnp.array([[1e20, -1e20, 3e19, 1.0], [1.0, -2.0, 3.0, 0.5]])
  y = layer(x, step=0, train=False)
  assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()
