"""`attention_fn` in Flax's attention modules, and `psa_jax.nnx`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import psa_jax
from psa_jax.config import ConfigError

pytestmark = pytest.mark.tier('default')

B, T, N, D = 2, 48, 2, 16
PSA = dict(block_q=8, block_k=4, window=4)


def inputs(seed=0, shape=(B, T, D)):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def layer(attention_fn=None, **options):
  own = {} if attention_fn is None else dict(attention_fn=attention_fn)
  return nnx.MultiHeadAttention(
    N, D, decode=False, rngs=nnx.Rngs(0), **options, **own
  )


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


# NNX's MultiHeadAttention.


@pytest.mark.parametrize('kind', ['psa', 'topk', 'dense'])
def test_with_everything_kept_a_layer_gives_what_it_gave(kind):
  own = {} if kind == 'dense' else dict(keep=1.0)
  ours = layer(psa_jax.attention_fn(kind, **own))
  x = inputs()
  close(ours(x, is_causal=True), layer()(x, is_causal=True))


def test_restricted_it_gives_something_else_and_learns():
  ours = layer(psa_jax.attention_fn('psa', **PSA, keep=0.1))
  x = inputs()
  got = ours(x, is_causal=True)
  assert np.abs(got - layer()(x, is_causal=True)).max() > 1e-3
  grads = nnx.grad(lambda m: (m(x, is_causal=True) ** 2).sum())(ours)
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()


def test_a_layer_that_masks_by_hand():
  """As in a model that was written for dense attention."""
  tokens = np.where(np.arange(T) < 40, 1, 0)[None].repeat(B, 0)
  mask = nnx.combine_masks(
    nnx.make_causal_mask(jnp.asarray(tokens)),
    nnx.make_attention_mask(tokens > 0, tokens > 0),
  )
  x = inputs()
  want = layer()(x, mask=mask)
  got = layer(psa_jax.attention_fn('psa', keep=1.0))(x, mask=mask)
  close(got[:, :40], want[:, :40])


def test_causality_can_be_part_of_the_function():
  x = inputs()
  ours = layer(psa_jax.attention_fn('psa', is_causal=True, keep=1.0))
  close(ours(x), layer()(x, is_causal=True))
  with pytest.raises(ConfigError, match="kind='psa' is causal; pass is_causal"):
    layer(psa_jax.attention_fn('psa'))(x)


def test_more_and_fewer_batch_axes():
  x = inputs(shape=(2, 3, T, D))
  ours = layer(psa_jax.attention_fn('psa', keep=1.0))
  want = layer()(x.reshape(6, T, D), is_causal=True).reshape(x.shape)
  close(ours(x, is_causal=True), want)
  close(ours(x[0, 0], is_causal=True), want[0, 0])


def test_a_cache_is_read_densely_by_auto():
  x = inputs()[:, :5]
  want = layer()(x, is_causal=True)
  ours = layer(psa_jax.attention_fn('auto', keep=0.1))
  ours.init_cache((B, 8, D))
  steps = [ours(x[:, t : t + 1], decode=True) for t in range(5)]
  close(jnp.concatenate(steps, 1), want)
  other = layer(psa_jax.attention_fn('psa'))
  other.init_cache((B, 8, D))
  with pytest.raises(ConfigError, match=r"differ in length.*'auto'"):
    other(x[:, :1], decode=True)


def test_compute_dtype():
  ours = layer(psa_jax.attention_fn('psa'), dtype=jnp.bfloat16)
  assert ours(inputs(), is_causal=True).dtype == jnp.bfloat16


REFUSED = {
  'dropout_rate=0.1': dict(dropout_rate=0.1, deterministic=False),
  'precision': dict(precision='highest'),
}


@pytest.mark.parametrize('text', REFUSED)
def test_what_it_cannot_do_is_refused_by_name(text):
  ours = layer(psa_jax.attention_fn('psa'), **REFUSED[text])
  with pytest.raises(ConfigError, match=text):
    ours(inputs(), is_causal=True, rngs=nnx.Rngs(1))


def test_sown_weights_and_bias_are_refused():
  with pytest.raises(ConfigError, match='sow_weights'):
    layer(psa_jax.attention_fn('psa'))(
      inputs(), is_causal=True, sow_weights=True
    )
  q = inputs(shape=(B, T, N, 8))
  with pytest.raises(ConfigError, match='takes no bias='):
    psa_jax.attention_fn('psa', is_causal=True)(
      q, q, q, jnp.zeros((1, 1, T, T))
    )


def test_dropout_that_is_off_is_not_refused():
  ours = layer(psa_jax.attention_fn('psa'), dropout_rate=0.1)
  out = ours(inputs(), is_causal=True, deterministic=True)
  assert np.isfinite(out).all()


def test_a_wrong_setting_is_refused_when_the_function_is_made():
  with pytest.raises(ConfigError, match='did you mean keep='):
    psa_jax.attention_fn('psa', kep=0.1)
  with pytest.raises(ConfigError, match="did you mean 'psa'"):
    psa_jax.attention_fn('pas')


# Linen's.


def test_linen_takes_it_too():
  x = inputs()
  mask = linen.make_causal_mask(jnp.ones((B, T)))
  theirs = linen.MultiHeadDotProductAttention(num_heads=N)
  params = theirs.init(jax.random.key(0), x)
  want = theirs.apply(params, x, mask=mask)
  fn = psa_jax.attention_fn('psa', keep=1.0)
  ours = linen.MultiHeadDotProductAttention(num_heads=N, attention_fn=fn)
  close(ours.apply(params, x, mask=mask), want)
  causal = psa_jax.attention_fn('psa', is_causal=True, keep=1.0)
  ours = linen.MultiHeadDotProductAttention(num_heads=N, attention_fn=causal)
  close(ours.apply(params, x), want)


def test_linen_dropout_is_refused():
  fn = psa_jax.attention_fn('psa', is_causal=True)
  ours = linen.MultiHeadDotProductAttention(
    num_heads=N, attention_fn=fn, dropout_rate=0.1, deterministic=False
  )
  with pytest.raises(ConfigError, match='dropout_rate=0.1'):
    keys = dict(params=jax.random.key(0), dropout=jax.random.key(1))
    ours.init(keys, inputs())


# Schedules in layers that hand no step on.


def test_at_step_moves_the_schedule_of_a_foreign_layer():
  keep = psa_jax.schedules.linear(1.0, 0.05, length=10)
  ours = layer(psa_jax.attention_fn('psa', is_causal=True, **PSA, keep=keep))
  graph, state = nnx.split(ours)
  traces = []

  @jax.jit
  def run(state, step, x):
    traces.append(1)
    with psa_jax.at_step(step):
      return nnx.merge(graph, state)(x)

  x = inputs()
  outs = [run(state, step, x) for step in (0, 5, 10)]
  assert len(traces) == 1
  close(outs[0], layer()(x, is_causal=True))
  assert np.abs(outs[1] - outs[0]).max() > 1e-4
  assert np.abs(outs[2] - outs[1]).max() > 1e-4


# SparseAttention.

KINDS = {
  'psa': dict(PSA, keep=0.3),
  'topk': dict(keep=0.3, learnable=True),
  'dsa': dict(PSA, heads=2, width=8, top_k=16),
  'sla': {},
  'nsa': dict(
    compress_block=8, stride=4, select_block=8, window=4, tile=4, blocks=4
  ),
}


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_of_a_layer_learns(kind):
  module = psa_jax.nnx.SparseAttention(
    N, D, kind=kind, num_kv_heads=1, rngs=nnx.Rngs(0), **KINDS[kind]
  )
  graph, params = nnx.split(module)
  x = inputs()

  @jax.jit
  def run(params):
    out, aux = nnx.merge(graph, params)(x, return_aux=True)
    extra = sum(v for k, v in aux.items() if k.startswith('loss/'))
    return (out**2).sum() + extra, (out, aux)

  grads, (out, aux) = jax.grad(run, has_aux=True)(params)
  assert out.shape == x.shape and 0 < aux['density'] <= 1
  for path, grad in nnx.to_flat_state(grads):
    assert np.isfinite(grad[...]).all(), path
    assert np.abs(grad[...]).max() > 0, path


def test_a_layer_is_its_projections_and_the_call():
  """An independent composition, without rotary positions."""
  module = psa_jax.nnx.SparseAttention(
    N, D, rotary_base=None, rngs=nnx.Rngs(0), **PSA, keep=0.3
  )
  x, weights = inputs(), module.layer
  q, k, v = (
    np.einsum('btd,dnh->btnh', x, w[...])
    for w in (weights.wq, weights.wk, weights.wv)
  )
  out = psa_jax.attention(q, k, v, is_causal=True, **PSA, keep=0.3)
  want = np.einsum('btnh,nhd->btd', out, weights.wo[...])
  close(module(x), want)
  close(module(np.asarray(x)), want)


def test_documents_begin_at_position_0():
  module = psa_jax.nnx.SparseAttention(N, D, rngs=nnx.Rngs(0), **PSA)
  x = inputs()
  seg = np.repeat([[0, 1]], T // 2, 1).repeat(B, 0)
  got = module(x, segment_ids=seg)
  close(got[:, : T // 2], module(x[:, : T // 2]))
  close(got[:, T // 2 :], module(x[:, T // 2 :]))


def test_an_empty_batch_is_an_empty_result():
  module = psa_jax.nnx.SparseAttention(N, D, rngs=nnx.Rngs(0), **PSA)
  assert module(inputs()[:0]).shape == (0, T, D)


def sparse(num_heads=N, in_features=D, **options):
  return psa_jax.nnx.SparseAttention(
    num_heads, in_features, rngs=nnx.Rngs(0), **options
  )


@pytest.mark.parametrize(
  'options, text',
  [
    (dict(num_heads=3), 'in_features=16 must be a multiple of num_heads=3'),
    (dict(num_kv_heads=3), 'num_heads=2 must be a multiple of num_kv_heads=3'),
    (dict(kind='pas'), "did you mean 'psa'"),
    (dict(is_causal=False), "kind='psa' is causal, but is_causal is False"),
    (dict(kind='dsa', rotary_base=None), 'pass rotary_base='),
    (dict(kep=0.1), 'did you mean keep='),
  ],
)
def test_a_layer_that_cannot_be_is_refused(options, text):
  with pytest.raises(ConfigError, match=text):
    sparse(**options)


def test_an_input_that_does_not_fit_is_named():
  module = sparse()
  with pytest.raises(ValueError, match=r'x \(2, 48, 9\) must be'):
    module(jnp.zeros((B, T, 9)))
  with pytest.raises(ValueError, match=r'segment_ids \(2, 9\)'):
    module(inputs(), segment_ids=np.zeros((B, 9), int))
  keep = psa_jax.schedules.linear(1, 0.1, length=10)
  with pytest.raises(ConfigError, match='keep is a schedule that moves'):
    sparse(keep=keep)(inputs())


# PRepBN.


def test_prepbn_goes_from_a_layer_norm_to_a_batch_norm():
  norm = psa_jax.nnx.PRepBN(D, decay_steps=10, rngs=nnx.Rngs(0))
  x = 3 + 2 * inputs()
  first = norm(x, step=0, train=True)
  close(first, nnx.LayerNorm(D, epsilon=1e-6, rngs=nnx.Rngs(0))(x))
  rows = np.asarray(x, np.float64).reshape(-1, D)
  want = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) + rows
  close(norm(x, step=10, train=True), want.reshape(x.shape))
  close(norm.mean[...], 0.19 * rows.mean(0))


def test_prepbn_takes_the_step_of_at_step():
  norm = psa_jax.nnx.PRepBN(D, decay_steps=10)
  with psa_jax.at_step(10):
    got = norm(np.asarray(inputs()))
  close(got, norm(inputs(), step=10))
  with pytest.raises(ConfigError, match='gamma of PRepBN moves, but no step'):
    norm(inputs())


def test_prepbn_refuses_and_survives():
  norm = psa_jax.nnx.PRepBN(D, decay_steps=10)
  with pytest.raises(ValueError, match=r'x \(2, 48, 9\) must have 16 features'):
    norm(jnp.zeros((B, T, 9)), step=0)
  assert norm(inputs()[:0], step=0, train=True).shape == (0, T, D)
  assert (norm.mean[...] == 0).all()
  with pytest.raises(ConfigError, match='momentum'):
    psa_jax.nnx.PRepBN(D, decay_steps=10, momentum=2.0)
