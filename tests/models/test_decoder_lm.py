"""The decoder LM: causality, layer loop, rematerialisation, sizes, dtypes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax import models, sharding
from psa_jax.attention import layer as attention_layer
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.psa import PsaConfig
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  MeshConfig,
  ModelConfig,
  NormConfig,
  ScheduleConfig,
)
from psa_jax.types import AttnOut

pytestmark = pytest.mark.tier('default')

V, T = 28, 24
PREPBN = NormConfig(kind='prepbn', decay_steps=8, scale_init=0.5, eta_init=0.5)
DENSE = AttentionConfig('dense')
PSA = AttentionConfig(
  name='psa',
  psa=PsaConfig(
    block_q=4,
    block_k=4,
    window=4,
    keep=ScheduleConfig(kind='linear', init=1.0, final=0.1, length=8),
  ),
)
SMALL = ModelConfig(
  num_layers=2,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  norm=PREPBN,
)


def config(**changes):
  return dataclasses.replace(SMALL, **changes)


def tokens(rows=4, length=T, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32)


@functools.cache
def structure(cfg, vocab=V):
  """Graph definition and abstract state, without computing a thing."""
  found = []

  def init():
    model = models.build(cfg, vocab, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    found.append(graphdef)
    return nnx.as_pure(params), nnx.as_pure(stats)

  state = jax.eval_shape(init)
  return found[0], *state


@functools.cache
def arrays(cfg):
  """Parameters and statistics from NumPy; the norms are not at rest."""
  rng = np.random.default_rng(1)
  middle = {'scale': 1.0, 'bn_scale': 0.7, 'eta': 0.5, 'var': 1.0}

  def fill(path, leaf):
    name = path[-1].key
    noise = rng.standard_normal(leaf.shape)
    if name == 'var':
      noise = np.abs(noise)
    return jnp.asarray(middle.get(name, 0.0) + 0.25 * noise, leaf.dtype)

  return jax.tree.map_with_path(fill, structure(cfg)[1:])


@functools.cache
def forward_of(cfg, train):
  graphdef = structure(cfg)[0]

  @jax.jit
  def run(params, stats, batch, step, companions):
    model = nnx.merge(graphdef, params, stats)
    companions = dict(companions)
    positions = companions.pop('positions', None)
    context = AttentionContext(step=step, train=train, **companions)
    out = model(batch, context=context, positions=positions)
    return out, nnx.as_pure(nnx.state(model, nnx.BatchStat))

  return run


def forward(cfg, batch, *, step, train, **companions):
  """The compiled forward pass: `ModelOut` and the statistics after it."""
  run = forward_of(cfg, train)
  return run(*arrays(cfg), batch, jnp.int32(step), companions)


def loss_and_grads(cfg, batch, state=None, step=4):
  """A jitted training step over plain arrays, as the trainer writes it."""
  graphdef = structure(cfg)[0]

  @jax.jit
  def run(params, stats, batch, step):
    def loss(params):
      model = nnx.merge(graphdef, params, stats)
      out = model(batch, context=AttentionContext(step=step, train=True))
      nll = -jax.nn.log_softmax(model.unembed(out.hidden)[:, :-1])
      nll = jnp.take_along_axis(nll, batch[:, 1:, None], -1).mean()
      return nll, (out.aux, nnx.as_pure(nnx.state(model, nnx.BatchStat)))

    return jax.value_and_grad(loss, has_aux=True)(params)

  params, stats = state or arrays(cfg)
  (nll, (aux, moved)), grads = run(params, stats, batch, jnp.int32(step))
  return {'nll': nll, 'aux': aux, 'stats': moved, 'grads': grads}


@functools.cache
def plain_step(attention):
  """The step with scanned layers and nothing recomputed."""
  return loss_and_grads(config(attention=attention), tokens())


def assert_close(got, want, rtol=1e-4, atol=1e-6):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize('attention', [DENSE, PSA])
def test_later_tokens_do_not_change_earlier_outputs(attention):
  norm = dataclasses.replace(PREPBN, base='layernorm', statistics='running')
  cfg = config(norm=norm, attention=attention)

  def hidden(batch):
    return np.asarray(forward(cfg, batch, step=6, train=True)[0].hidden)

  batch = tokens()
  before = hidden(batch)
  for t in (1, 7, 8, 9, 23):
    after = hidden(batch.at[:, t:].set((batch[:, t:] + 5) % V))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert np.all(np.abs(after[:, t:] - before[:, t:]).max(-1) > 1e-5)


def test_batch_statistics_leak_the_future_in_training_but_not_in_evaluation():
  moved = {}
  for train in (True, False):
    ends = [
      forward(SMALL, batch, step=6, train=train)[0].hidden[:, :12]
      for batch in (tokens(), tokens().at[:, 12:].set(3))
    ]
    moved[train] = np.abs(np.subtract(*ends)).max()
  assert moved[True] > 1e-3 and moved[False] == 0


def test_packed_documents_equal_documents_alone():
  cfg, half = config(attention=PSA), T // 2
  batch = tokens(rows=2)
  packed, _ = forward(
    cfg,
    batch,
    step=0,
    train=False,
    segment_ids=(jnp.arange(T)[None] // half).repeat(2, 0),
    positions=(jnp.arange(T)[None] % half).repeat(2, 0),
  )
  alone, _ = forward(cfg, batch.reshape(4, half), step=0, train=False)
  want = alone.hidden.reshape(2, T, -1)
  np.testing.assert_allclose(packed.hidden, want, rtol=1e-5, atol=1e-5)


def test_the_step_is_not_trivial():
  step = plain_step(DENSE)
  assert step['nll'] > 0.5 and step['aux']['gamma'] == 0.5
  assert all(np.any(g) for g in jax.tree.leaves(step['grads']))


def test_unrolled_layers_equal_scanned_ones():
  got = loss_and_grads(config(scan_layers=False), tokens())
  assert_close(got, plain_step(DENSE))


@pytest.mark.parametrize('remat', ['full', 'attention'])
def test_remat_changes_no_number(remat):
  got = loss_and_grads(config(attention=PSA, remat=remat), tokens())
  assert_close(got, plain_step(PSA))


def count_exponentials(jaxpr):
  total = 0
  for eqn in jaxpr.eqns:
    total += eqn.primitive.name == 'exp'
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      total += count_exponentials(inner) if hasattr(inner, 'eqns') else 0
  return total


@pytest.mark.parametrize('attention', [DENSE, PSA])
def test_remat_attention_does_not_run_attention_twice(attention):
  exponentials = {}
  for remat in ('none', 'attention', 'full'):
    cfg = config(attention=attention, remat=remat)
    graphdef, params, stats = structure(cfg)

    def loss(params, stats, graphdef=graphdef):
      model = nnx.merge(graphdef, params, stats)
      return model(
        tokens(), context=AttentionContext(step=4, train=True)
      ).hidden.sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, stats)
    exponentials[remat] = count_exponentials(jaxpr.jaxpr)
  assert exponentials['none'] == exponentials['attention']
  assert exponentials['full'] > exponentials['none']


def test_statistics_of_every_layer_move_in_training_only():
  before = arrays(SMALL)[1]
  _, after = forward(SMALL, tokens(), step=0, train=False)
  assert_close(after, before, 0, 0)
  _, after = forward(SMALL, tokens(), step=0, train=True)
  for old, new in zip(
    jax.tree.leaves(before), jax.tree.leaves(after), strict=True
  ):
    assert new.shape == old.shape
    moved = np.abs(np.asarray(new - old)).reshape(-1, 16).max(-1)
    assert np.all(moved > 1e-3)  # each layer's


def test_first_norm_sees_the_embedding_and_the_mask():
  mask = np.random.default_rng(2).random((4, T)) < 0.5
  _, after = forward(
    SMALL, tokens(), step=0, train=True, mask=jnp.asarray(mask)
  )
  params, before = arrays(SMALL)
  rows = np.asarray(params['embedding'], np.float64)[np.asarray(tokens())]
  old, new = (
    np.asarray(stats['layers']['attention_norm']['mean'])[0]
    for stats in (before, after)
  )
  want = 0.9 * old + 0.1 * rows[mask].mean(0)
  np.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-7)


def test_padding_outside_the_mask_has_no_influence_on_a_causal_model():
  mask = jnp.arange(T)[None].repeat(4, 0) < 15
  runs = []
  for filler in (3, 17):
    batch = tokens().at[:, 15:].set(filler)
    out, stats = forward(SMALL, batch, step=6, train=True, mask=mask)
    runs.append((out.hidden[:, :15], *jax.tree.leaves(stats)))
  for a, b in zip(*runs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_aux_scalars_are_means_over_layers():
  cfg = config(attention=PSA)
  aux = forward(cfg, tokens(), step=6, train=True)[0].aux
  assert aux['gamma'] == 0.25 and 0 < aux['density'] < 1
  assert all(v.shape == () and v.dtype == jnp.float32 for v in aux.values())
  reading = config(attention=PSA.read_by('dense'))
  dense, _ = forward(reading, tokens(), step=6, train=False)
  assert dense.aux['density'] == 1
  plain = config(norm=NormConfig())
  out = jax.eval_shape(lambda: forward(plain, tokens(), step=6, train=False)[0])
  assert set(out.aux) == {'density'}


def test_aux_is_the_mean_of_what_every_layer_said(monkeypatch):
  said = []

  def attend(q, k, v, **kwargs):
    said.append(jnp.mean(jnp.abs(q)))
    return AttnOut(q, {'density': said[-1]})

  monkeypatch.setattr(attention_layer, 'attend', attend)
  model = nnx.merge(structure(config(scan_layers=False))[0], *arrays(SMALL))
  aux = model(tokens(), context=AttentionContext(step=0, train=False)).aux
  assert len(said) == 2 and abs(said[0] - said[1]) > 0.01
  np.testing.assert_allclose(aux['density'], np.mean(said), rtol=1e-6)


def test_one_compilation_serves_every_step():
  cfg, seen = config(attention=PSA), []
  for step in (0, 1, 4, 7, 8, 9):
    aux = forward(cfg, tokens(), step=step, train=True)[0].aux
    seen.append((float(aux['gamma']), float(aux['density'])))
  assert forward_of(cfg, True)._cache_size() == 1
  assert seen[0] == (1, 1) and seen[-1] == seen[-2]
  assert all(a >= b for a, b in zip(seen, seen[1:], strict=False))


def test_eight_devices_equal_one():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  state = arrays(SMALL)
  where = tuple(sharding.tree_shardings(part, mesh) for part in state)
  with jax.set_mesh(mesh):
    batch = jax.device_put(tokens(), sharding.batch_sharding(mesh))
    got = loss_and_grads(SMALL, batch, jax.device_put(state, where))
  assert_close(got, plain_step(DENSE), rtol=5e-4, atol=5e-6)


def test_the_output_matrix_is_the_embedding():
  graphdef, *_ = structure(SMALL)
  params, stats = arrays(SMALL)
  assert set(params) == {'embedding', 'layers', 'final_norm'}
  model = nnx.merge(graphdef, params, stats)
  hidden = np.random.default_rng(4).standard_normal((2, 3, 16))
  logits = model.unembed(jnp.asarray(hidden, jnp.float32))
  table = np.asarray(params['embedding'])
  assert logits.dtype == jnp.float32
  want = hidden @ table.astype(np.float64).T
  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)
  rows = table[np.asarray(tokens())]
  np.testing.assert_array_equal(model.embed(tokens()), rows)
  # Tokens that are never read get a gradient too: from the output.
  unread = sorted(set(range(V)) - set(np.asarray(tokens()).flat))
  grads = np.asarray(plain_step(DENSE)['grads']['embedding'])[unread]
  assert unread and np.all(np.abs(grads).max(-1) > 0)


def test_a_token_outside_the_vocabulary_is_loud():
  out, _ = forward(SMALL, tokens().at[0, 20].set(V), step=0, train=False)
  assert np.all(np.isnan(out.hidden[0, 20:]))
  assert np.all(np.isfinite(out.hidden[1]))


def test_initial_values():
  cfg = config(
    num_layers=8, d_model=64, mlp_dim=128, norm=NormConfig(), vocab_size=64
  )

  @jax.jit
  def start(seed, batch):
    model = models.build(cfg, V, rngs=nnx.Rngs(jax.random.key(seed)))
    hidden = model(batch, context=AttentionContext(step=0, train=False)).hidden
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    return params, model.unembed(hidden)

  batch = tokens(rows=4, length=32)
  params, logits = start(0, batch)
  nll = -np.asarray(jax.nn.log_softmax(logits))[:, :-1]
  nll = np.take_along_axis(nll, np.asarray(batch)[:, 1:, None], -1).mean()
  assert nll == pytest.approx(math.log(64), abs=0.25)
  assert np.asarray(logits).std() == pytest.approx(0.5, abs=0.1)
  mlp, attention = params['layers']['mlp'], params['layers']['attention']
  stds = {
    'w_gate': (mlp['w_gate'], 64**-0.5),
    'w_up': (mlp['w_up'], 64**-0.5),
    'w_down': (mlp['w_down'], (128 * 16) ** -0.5),
    'wo': (attention['wo'], (64 * 16) ** -0.5),
    'embedding': (params['embedding'], 0.5 / 8),
  }
  for name, (kernel, want) in stds.items():
    assert np.asarray(kernel).std() == pytest.approx(want, rel=0.05), name
  kernels = np.asarray(mlp['w_gate'])
  assert not np.allclose(kernels[0], kernels[1])
  again, other = start(0, batch)[0], start(1, batch)[0]
  assert_close(again, params, 0, 0)
  assert not np.allclose(other['layers']['mlp']['w_gate'], kernels)


def test_bf16_compute_keeps_f32_where_it_matters():
  narrow = config(compute_dtype='bfloat16')
  out, stats = forward(narrow, tokens(), step=4, train=True)
  assert out.hidden.dtype == jnp.bfloat16
  scalars = jax.tree.leaves((out.aux, stats))
  assert {x.dtype.name for x in scalars} == {'float32'}
  wide, _ = forward(SMALL, tokens(), step=4, train=True)
  error = np.asarray(out.hidden, np.float32) - np.asarray(wide.hidden)
  assert np.linalg.norm(error) < 0.02 * np.linalg.norm(wide.hidden)
  step = jax.eval_shape(lambda: loss_and_grads(narrow, tokens()))
  assert {x.dtype.name for x in jax.tree.leaves(step)} == {'float32'}


def test_parameter_dtype_does_not_touch_statistics():
  _, params, stats = structure(config(param_dtype='bfloat16'))
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'bfloat16'}
  assert {x.dtype.name for x in jax.tree.leaves(stats)} == {'float32'}


@pytest.mark.parametrize(
  'kind, vectors',
  [('rmsnorm', 1), ('layernorm', 2), ('batchnorm', 2), ('repbn', 2)]
  + [('prepbn', 3)],
)
def test_parameter_count(kind, vectors):
  norm = dataclasses.replace(PREPBN, kind=kind)
  _, params, stats = structure(config(norm=norm, head_dim=6))
  width, heads = 16, 6 * (4 + 2 + 2 + 4)
  one_norm = vectors * width + (kind in ('repbn', 'prepbn'))
  layer = width * heads + 3 * width * 24 + 2 * one_norm
  want = V * width + 2 * layer + one_norm
  assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == want
  moving = 5 * 2 * width if kind in ('batchnorm', 'repbn', 'prepbn') else 0
  assert sum(math.prod(s.shape) for s in jax.tree.leaves(stats)) == moving


def test_a_7b_model_is_built_abstractly():
  cfg = ModelConfig(
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14_336,
    norm=PREPBN,
    attention=PSA,
    compute_dtype='bfloat16',
    remat='attention',
  )
  graphdef, params, stats = structure(cfg, 32_000)
  count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
  assert 7.0e9 < count < 7.3e9
  assert params['layers']['attention']['wk'].shape == (32, 4096, 8, 128)

  def loss(params, stats, batch):
    model = nnx.merge(graphdef, params, stats)
    out = model(batch, context=AttentionContext(step=0, train=True))
    return model.unembed(out.hidden).sum()

  batch = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
  grads = jax.eval_shape(jax.grad(loss), params, stats, batch)
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_every_array_has_axis_names_and_stacked_vectors_stay_vectors():
  for kind in ('rmsnorm', 'layernorm', 'prepbn'):
    base = 'layernorm' if kind == 'prepbn' else 'rmsnorm'
    norm = dataclasses.replace(PREPBN, kind=kind, base=base)
    for path, leaf in jax.tree.leaves_with_path(
      structure(config(norm=norm))[1:]
    ):
      stacked = any(getattr(k, 'key', '') == 'layers' for k in path)
      assert len(sharding.axis_names(path, leaf)) == leaf.ndim - stacked


def test_vocabulary_of_the_recipe_may_be_larger_but_not_smaller():
  assert structure(config(vocab_size=32))[1]['embedding'].shape == (32, 16)
  with pytest.raises(ConfigError, match='vocab_size=27 cannot hold the 28'):
    structure(config(vocab_size=27))


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(kind='decoder'), "kind: unknown 'decoder'"),
    (dict(num_kv_heads=3), 'must be a multiple'),
  ],
)
def test_an_impossible_model_is_refused(change, words):
  with pytest.raises(ConfigError, match=words):
    structure(config(**change))


def test_an_unknown_remat_is_refused():
  with pytest.raises(ConfigError, match="remat: unknown 'some'"):
    forward(config(remat='some'), tokens(), step=0, train=True)


@pytest.mark.parametrize('name', ['positions', 'segment_ids', 'mask'])
def test_companions_of_another_shape_are_refused(name):
  companion = {name: jnp.zeros((2, T + 1), jnp.int32)}
  with pytest.raises((ValueError, TypeError), match=name):
    forward(SMALL, tokens(), step=0, train=True, **companion)
