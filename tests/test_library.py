"""`psa_jax.attention` and its neighbours, as another program uses them."""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psa_jax
from psa_jax.attention.call import dense as dense_call
from psa_jax.attention.psa import PsaConfig
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import ConfigError
from tests import oracles

# Its overloads want each argument by itself.
of_jax: Any = jax.nn.dot_product_attention

slow = pytest.mark.tier('default')

B, T, N, K, H = 2, 48, 4, 2, 16
# Restricts on 48 tokens: sink, own tile and a short window are less than all.
PSA = dict(block_q=8, block_k=4, window=4, is_causal=True)


def arrays(seed=0, t=T, s=None, dtype=np.float32, hv=H):
  rng = np.random.default_rng(seed)
  s = t if s is None else s
  shapes = (B, t, N, H), (B, s, K, H), (B, s, K, hv)
  return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def as_jax(*xs):
  return tuple(map(jnp.asarray, xs))


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


# The dense limit, against a definition that shares no code.


@slow
@pytest.mark.parametrize('kind', ['psa', 'topk', 'hybrid', 'dense'])
@pytest.mark.parametrize('documents', [False, True])
def test_with_everything_kept_it_is_dense(kind, documents):
  q, k, v = arrays(hv=24)
  seg = np.repeat([[0, 1, 2]], T // 3, 1).repeat(B, 0) if documents else None
  own = dict(keep=1.0) if kind != 'dense' else {}
  out, aux = psa_jax.attention(
    q,
    k,
    v,
    kind=kind,
    is_causal=True,
    segment_ids=seg,
    return_aux=True,
    **own,
  )
  mask = oracles.causal_mask(B, K, T, T, None if seg is None else (seg, seg))
  oracles.check_close(out, oracles.attention(q, k, v, mask)[0])
  assert aux['density'] == 1


@slow
def test_a_scale_is_a_scale_on_the_scores():
  q, k, v = arrays()
  mask = oracles.causal_mask(B, K, T, T)
  want = oracles.attention(q, k, v, mask, 0.3)[0]
  for kind in ('psa', 'dense'):
    got = psa_jax.attention(q, k, v, kind=kind, is_causal=True, scale=0.3)
    oracles.check_close(got, want)


# JAX's function, form by form.

FORMS = {
  'plain': {},
  'causal': dict(is_causal=True),
  'scale': dict(scale=0.2),
  'bias': dict(bias=np.linspace(-1, 1, T).reshape(1, 1, 1, T)),
  'bias 3D': dict(bias=np.ones((N, T, T))),
  'mask': dict(mask=(np.arange(T) % 3 > 0).reshape(1, 1, 1, T)),
  'mask by head': dict(
    mask=np.random.default_rng(1).random((B, N, T, T)) < 0.7
  ),
  'lengths': dict(
    query_seq_lengths=np.array([T, 9], np.int32),
    key_value_seq_lengths=np.array([30, 9], np.int32),
  ),
  'window': dict(local_window_size=(5, 2)),
  'window, one number': dict(local_window_size=4, is_causal=True),
  'xla': dict(implementation='xla', is_causal=True),
  'no implementation': dict(implementation=None),
}


@slow
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_dense_equals_jax(form, array):
  q, k, v = map(array, arrays())
  options = FORMS[form]
  want = of_jax(q, k, v, **options)
  got = psa_jax.attention(q, k, v, kind='dense', **options)
  assert isinstance(got, jax.Array) and got.dtype == want.dtype
  close(got, want)


@slow
@pytest.mark.parametrize('form', ['mask', 'lengths', 'bias'])
def test_what_dense_masks_may_be_nan(form):
  """The bits of zeros there, also of the gradients; what reads it is NaN."""
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(2, 9, n, 4)), jnp.float32) for n in (4, 2, 2)
  )
  seen = np.arange(9) < np.asarray([6, 9])[:, None]
  mask = np.broadcast_to(seen[:, None, None], (2, 1, 9, 9)).copy()
  mask[0, 0, 2:, 5] = False  # the first two queries read it
  keys = ~seen
  if form == 'mask':
    keys[0, 5] = True
  options = {
    'mask': dict(mask=mask),
    'lengths': dict(key_value_seq_lengths=np.asarray([6, 9], np.int32)),
    'bias': dict(bias=np.where(seen, 0.0, -np.inf)[:, None, None]),
  }[form]
  reads = np.zeros((2, 9), bool)
  reads[0, :2] = form == 'mask'

  @jax.jit
  def run(k, v):
    def loss(q, k, v):
      out = psa_jax.attention(q, k, v, kind='dense', **options)
      return jnp.sin(jnp.where(reads[..., None, None], 0, out)).sum(), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  def filled(value):
    return run(*(jnp.where(keys[..., None, None], value, x) for x in (k, v)))

  want, got = filled(0.0), filled(np.nan)
  jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
  np.testing.assert_array_equal(got[1][~reads], want[1][~reads])
  assert np.isnan(got[1][reads]).all()


def test_dense_equals_jax_without_a_batch_axis():
  q, k, v = (x[0] for x in arrays())
  for options in (dict(is_causal=True), dict(mask=np.tri(T, dtype=bool)[None])):
    want = of_jax(q, k, v, **options)
    close(psa_jax.attention(q, k, v, kind='dense', **options), want)


@slow
def test_dense_equals_jax_across_sequences():
  q, k, v = arrays(t=5, s=9)
  for causal in (False, True):
    want = of_jax(q, k, v, is_causal=causal)
    close(psa_jax.attention(q, k, v, kind='dense', is_causal=causal), want)


@slow
@pytest.mark.parametrize('masked', [False, True])
def test_dense_returns_jax_residual(masked):
  q, k, v = arrays()
  mask = np.tri(T, dtype=bool)[None, None] if masked else None
  options = dict(is_causal=True, return_residual=True, mask=mask)
  want, want_lse = of_jax(q, k, v, **options)
  got, lse = psa_jax.attention(q, k, v, kind='dense', **options)
  close(got, want)
  close(lse, want_lse)


@slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_sparse_kind_takes_the_same_forms(dtype):
  args = [jnp.asarray(x, dtype) for x in arrays()]
  out = psa_jax.attention(*args, **PSA, keep=0.3)
  assert out.shape == (B, T, N, H) and out.dtype == dtype
  alone = psa_jax.attention(*(x[0] for x in args), **PSA, keep=0.3)
  np.testing.assert_array_equal(alone, out[0])
  if dtype == 'float32':
    numpy = psa_jax.attention(*arrays(), **PSA, keep=0.3)
    np.testing.assert_array_equal(numpy, out)


# The name is a package as well.


@slow
def test_the_package_is_called_and_imported_from():
  from psa_jax.attention.psa import psa

  assert callable(psa)
  out = psa_jax.attention(*arrays(), **PSA)
  assert out.shape == (B, T, N, H)
  assert psa_jax.attention.psa.psa is psa


@slow
def test_jit_vmap_and_grad_take_it_as_a_function():
  args = as_jax(*arrays())
  want = psa_jax.attention(*args, **PSA, keep=0.3)
  run = jax.jit(psa_jax.attention, static_argnames=('kind', 'keep', *PSA))
  np.testing.assert_allclose(run(*args, **PSA, keep=0.3), want, atol=1e-6)
  mapped = jax.vmap(lambda *a: psa_jax.attention(*a, **PSA, keep=0.3))(*args)
  np.testing.assert_allclose(mapped, want, atol=1e-6)
  grad = jax.grad(lambda q: psa_jax.attention(q, *args[1:], **PSA).sum())
  assert np.isfinite(grad(args[0])).all()


def test_every_public_name_is_there():
  for name in psa_jax.__all__:
    assert getattr(psa_jax, name) is not None
    assert name in dir(psa_jax)
  with pytest.raises(AttributeError, match='no attribute'):
    _ = psa_jax.atention


# Options and schedules.


@slow
def test_a_config_and_its_fields_say_the_same():
  from psa_jax.config import AttentionConfig

  settings = PsaConfig(
    block_q=8, block_k=4, window=4, keep=psa_jax.schedules.constant(0.3)
  )
  args = arrays()
  want = psa_jax.attention(*args, **PSA, keep=0.3)
  got = psa_jax.attention(*args, is_causal=True, config=settings)
  np.testing.assert_array_equal(got, want)
  whole = AttentionConfig(name='psa', psa=settings)
  got = psa_jax.attention(*args, is_causal=True, config=whole)
  np.testing.assert_array_equal(got, want)


def density(step=None, **options):
  keep = psa_jax.schedules.linear(1.0, 0.1, length=10)
  aux = psa_jax.attention(
    *arrays(), **PSA, keep=keep, step=step, return_aux=True, **options
  ).aux
  return float(aux['density'])


@slow
def test_a_schedule_follows_the_step():
  assert density(step=0) == 1
  assert density(step=10) < density(step=5) < 1


@slow
def test_a_schedule_follows_at_step_inside_jit():
  traces = []

  @jax.jit
  def run(step):
    traces.append(1)
    with psa_jax.at_step(step):
      keep = psa_jax.schedules.linear(1.0, 0.1, length=10)
      return psa_jax.attention(
        *arrays(), **PSA, keep=keep, return_aux=True
      ).aux['density']

  want = [density(step=step) for step in (0, 5, 10)]
  np.testing.assert_allclose([run(s) for s in (0, 5, 10)], want, rtol=1e-6)
  assert len(traces) == 1


@slow
def test_a_schedule_without_a_step_is_refused():
  with pytest.raises(ConfigError, match='keep is a schedule.*step='):
    density()
  with psa_jax.at_step(10):
    assert density() == density(step=10)
  with pytest.raises(ConfigError, match='no step is known'):
    density()


def test_a_step_that_jit_would_freeze_is_refused():
  with psa_jax.at_step(3), pytest.raises(ConfigError, match='outside jit'):
    jax.jit(density)()


@pytest.mark.parametrize(
  'name, ends',
  [
    ('linear', (1.0, 0.2)),
    ('cosine', (1.0, 0.2)),
    ('exponential', (1.0, 0.2)),
    ('cubic', (1.0, 0.2)),
  ],
)
def test_schedules_are_made_without_a_config(name, ends):
  schedules = psa_jax.schedules
  value = schedules.make(getattr(schedules, name)(*ends, begin=2, length=8))
  assert value(2) == ends[0] and value(10) == np.float32(ends[1])
  assert ends[1] < value(6) < ends[0]


def test_constant_and_piecewise_schedules():
  schedules = psa_jax.schedules
  assert schedules.make(schedules.constant(0.5))(7) == 0.5
  value = schedules.make(schedules.piecewise([1, 0.5, 0.25], [10, 20]))
  assert [float(value(s)) for s in (9, 10, 19, 20)] == [1, 0.5, 0.5, 0.25]
  with pytest.raises(ConfigError, match='boundaries'):
    schedules.piecewise([1, 0.5], [])


# Masks and lengths of sparse kinds.


def packed():
  """Documents of 20 and 20, then padding, as ids; -1 is padding."""
  return np.repeat([[0, 1, -1]], [20, 20, 8], 1).repeat(B, 0)


def mask_of(ids, causal=True):
  same = (ids[:, None, :, None] == ids[:, None, None, :]) & (
    ids[:, None, None, :] >= 0
  )
  return same & np.tri(T, dtype=bool) if causal else same


@slow
@pytest.mark.parametrize('is_causal', [False, True])
@pytest.mark.parametrize('jit', [False, True])
def test_a_mask_of_documents_is_obeyed(is_causal, jit):
  args, ids = arrays(), packed()
  mask = mask_of(ids, causal=not is_causal)
  options = PSA | dict(is_causal=is_causal, keep=0.4)

  def run(mask):
    return psa_jax.attention(*args, mask=mask, **options)

  got = (jax.jit(run) if jit else run)(mask)
  # Documents are 0, 1 and the padding; block lists are the same either way.
  seg = np.where(ids < 0, 2, ids)
  want = psa_jax.attention(*args, segment_ids=seg, **PSA, keep=0.4)
  real = ids >= 0
  np.testing.assert_allclose(got[real], want[real], atol=1e-6)
  assert (np.asarray(got)[~real] == 0).all()


@slow
def test_a_padding_mask_equals_jax_where_there_are_tokens():
  q, k, v = arrays()
  mask = (np.arange(T) < 30).reshape(1, 1, 1, T)
  want = of_jax(q, k, v, mask=mask, is_causal=True)
  got = psa_jax.attention(q, k, v, mask=mask, is_causal=True, keep=1.0)
  close(got[:, :30], want[:, :30])
  assert (got[:, 30:] == 0).all()
  want = of_jax(q, k, v, mask=mask)
  got = psa_jax.attention(q, k, v, mask=mask, kind='topk', keep=1.0)
  close(got[:, :30], want[:, :30])


def band():
  at = np.arange(T)
  return ((at[:, None] - at) < 7) & (at[:, None] >= at)


def holes():
  return np.broadcast_to(np.arange(T) % 5 > 0, (T, T))


@slow
@pytest.mark.parametrize('make', [band, holes])
def test_a_mask_that_says_more_is_refused_or_nan(make):
  args = arrays()
  mask = make()[None, None]

  def run(mask):
    return psa_jax.attention(*args, mask=mask, **PSA)

  with pytest.raises(ConfigError, match=r"mask \(1, 1, 48, 48\).*'dense'"):
    run(mask)
  out = jax.jit(run)(mask)
  assert np.isnan(out).any()


def test_a_mask_that_is_not_causal_is_refused():
  args = arrays()
  full = np.ones((1, 1, T, T), bool)
  with pytest.raises(ConfigError, match='is_causal=True'):
    psa_jax.attention(*args, mask=full, keep=0.5)
  with pytest.raises(ConfigError, match='differs by head'):
    psa_jax.attention(*args, mask=np.ones((1, N, T, T), bool), **PSA)


@slow
def test_lengths_of_padded_rows():
  q, k, v = arrays()
  lengths = np.array([T, 11], np.int32)
  kw = dict(is_causal=True, query_seq_lengths=lengths)
  want = of_jax(q, k, v, **kw)
  close(psa_jax.attention(q, k, v, keep=1.0, **kw), want)
  kw |= dict(key_value_seq_lengths=lengths)
  for kind in ('psa', 'topk'):
    for causal in (True, False) if kind == 'topk' else (True,):
      kw |= dict(is_causal=causal)
      want = of_jax(q, k, v, **kw)
      close(psa_jax.attention(q, k, v, kind=kind, keep=1.0, **kw), want)


@slow
def test_lengths_that_differ_are_refused_or_nan():
  args = arrays()

  def run(keys):
    queries = np.array([T, 11], np.int32)
    return psa_jax.attention(
      *args, query_seq_lengths=queries, key_value_seq_lengths=keys, **PSA
    )

  keys = np.array([T, 5], np.int32)
  with pytest.raises(ConfigError, match='differ'):
    run(keys)
  assert np.isnan(jax.jit(run)(keys)[1, :11]).all()


# Errors: the argument, its shape and the way out.


def change(**arrays_by_name):
  """The three arrays with some replaced."""
  q, k, v = arrays()
  base = dict(query=q, key=k, value=v)
  return tuple((base | arrays_by_name).values())


ZEROS = np.zeros((B, T, K, H), np.float32)
WRONG = {
  'lengths differ': (
    arrays(t=T, s=9),
    PSA,
    r"query \(2, 48, 4, 16\) and key \(2, 9, 2, 16\) differ in length.*'dense'",
  ),
  'head widths': (
    change(key=ZEROS[..., :8], value=ZEROS),
    PSA,
    r'key \(2, 48, 2, 8\).*same head width',
  ),
  'groups': (
    change(key=np.zeros((B, T, 3, H), 'f'), value=np.zeros((B, T, 3, H), 'f')),
    PSA,
    'the 4 query heads must be a multiple of the 3 key heads',
  ),
  'no heads': (
    change(key=ZEROS[:, :, :0], value=ZEROS[:, :, :0]),
    PSA,
    'multiple of the 0 key heads',
  ),
  'no width': (
    tuple(x[..., :0] for x in arrays()),
    PSA,
    'at least 1 wide',
  ),
  'batches': (change(query=np.zeros((3, T, N, H), 'f')), PSA, 'batch size'),
  'key and value': (
    change(value=ZEROS[:, :9]),
    PSA,
    'lengths of key and value',
  ),
  'heads of values': (change(value=ZEROS[:, :, :1]), PSA, 'number of heads'),
  'axes': (change(query=np.zeros((T, N, H), 'f')), PSA, 'all three must be'),
  'dtypes': (change(key=ZEROS.astype('float16')), PSA, 'float16.*cast'),
  'integers': (
    tuple(x.astype(np.int32) for x in arrays()),
    PSA,
    'query is int32; cast',
  ),
  'causal only': (arrays(), {}, "kind='psa' is causal; pass is_causal=True"),
  'unknown kind': (arrays(), dict(kind='pas'), "did you mean 'psa'"),
  'unknown option': (arrays(), dict(PSA, kep=0.1), 'did you mean keep='),
  'no option': (arrays(), dict(kind='dense', keep=0.1), 'kind=.dense.'),
  'config is a number': (
    arrays(),
    dict(PSA, config=0.3),
    'PsaConfig.*keep=0.3',
  ),
  'keep is text': (arrays(), dict(PSA, keep='0.3'), 'keep is a str'),
  'bias': (arrays(), dict(PSA, bias=np.zeros((1, 1, T, T))), 'no bias='),
  'window': (arrays(), dict(PSA, local_window_size=3), 'no local_window_size='),
  'residual': (arrays(), dict(PSA, return_residual=True), 'no return_residual'),
  'mask shape': (
    arrays(),
    dict(PSA, mask=np.ones((1, 1, T, 9), bool)),
    r'mask \(1, 1, 48, 9\) does not broadcast to .* = \(2, 4, 48, 48\)',
  ),
  'mask of floats': (arrays(), dict(PSA, mask=np.zeros((1, 1, T, T))), 'float'),
  'segments': (
    arrays(),
    dict(PSA, segment_ids=np.zeros((B, 9), int)),
    r'segment_ids \(2, 9\) must be',
  ),
  'lengths shape': (
    arrays(),
    dict(PSA, query_seq_lengths=np.zeros(5, int)),
    r'query_seq_lengths \(5,\) must be \[B\]',
  ),
  'keys only': (
    arrays(),
    dict(PSA, key_value_seq_lengths=np.full(B, 9, np.int32)),
    'give both',
  ),
  'blocks of 0': (
    arrays(),
    dict(PSA, block_q=0),
    'PsaConfig.block_q is 0, but it must be at least 1',
  ),
  'keep above 1': (arrays(), dict(PSA, keep=1.5), 'PsaConfig.keep.init is 1.5'),
  'settings of another': (
    arrays(),
    dict(PSA, config=TopkConfig()),
    "config is a TopkConfig, but kind='psa' takes a PsaConfig",
  ),
  'two sources': (
    arrays(),
    dict(
      PSA,
      segment_ids=np.zeros((B, T), int),
      query_seq_lengths=np.full(B, 9, np.int32),
    ),
    'give one of them',
  ),
}
for _kind in ('dsa', 'sla', 'nsa', 'nsa_tile'):
  WRONG[f'{_kind} without its parameters'] = (
    arrays(),
    dict(kind=_kind, is_causal=True),
    rf"kind='{_kind}' has parameters of its own; use psa_jax.nnx.SparseAtt",
  )


@pytest.mark.parametrize('case', WRONG)
def test_what_is_wrong_is_named(case):
  args, options, text = WRONG[case]
  with pytest.raises(ValueError, match=text) as error:
    psa_jax.attention(*args, **options)
  assert '\n' not in str(error.value)


@slow
@pytest.mark.parametrize('kind', ['psa', 'topk', 'dense', 'hybrid', 'auto'])
@pytest.mark.parametrize('empty', ['batch', 'length'])
def test_nothing_gives_nothing(kind, empty):
  args = arrays(hv=24)
  args = [x[:0] if empty == 'batch' else x[:, :0] for x in args]
  out = psa_jax.attention(*args, kind=kind, is_causal=True)
  shape = (0, T, N, 24) if empty == 'batch' else (B, 0, N, 24)
  assert out.shape == shape and out.dtype == jnp.float32


# `auto`.


@pytest.fixture
def said(monkeypatch, caplog):
  monkeypatch.setattr(dense_call, '_SAID', set())
  caplog.set_level(logging.WARNING, 'psa_jax')
  return caplog


@slow
def test_auto_is_dense_below_the_crossover_and_says_so_once(said):
  args = arrays()
  want = psa_jax.attention(*args, kind='dense', is_causal=True)
  for _ in range(2):
    got = psa_jax.attention(*args, **PSA | dict(kind='auto'), keep=0.1)
    np.testing.assert_array_equal(got, want)
  assert len(said.messages) == 1
  assert 'length 48 is below the 4096 measured on cpu' in said.messages[0]


@slow
def test_auto_is_psa_from_the_crossover_on(said, monkeypatch):
  monkeypatch.setattr(dense_call, 'CROSSOVER', {'cpu': T})
  args = arrays()
  want = psa_jax.attention(*args, **PSA, keep=0.1)
  got = psa_jax.attention(*args, **PSA | dict(kind='auto'), keep=0.1)
  np.testing.assert_array_equal(got, want)
  assert not said.messages
  # What psa cannot do, auto does densely.
  dense = psa_jax.attention(*args, kind='dense')
  got = psa_jax.attention(*args, kind='auto', keep=0.1)
  np.testing.assert_array_equal(got, dense)
  assert 'is_causal is False' in said.messages[0]


# The operations.


@slow
def test_top_k_takes_numpy():
  x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
  got = jax.jit(lambda: psa_jax.top_k(x, 5))()
  order = np.sort(np.argsort(-x, -1)[:, :5], -1)
  np.testing.assert_array_equal(got.indices, order)
  np.testing.assert_array_equal(got.values, np.take_along_axis(x, order, -1))
  counts = np.array([1, 2, 3])
  got = jax.jit(lambda: psa_jax.top_k(x, counts, max_k=4))()
  np.testing.assert_array_equal(got.count, counts)


@slow
def test_sparse_poly_softmax_takes_numpy():
  x = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
  cubic = (0.1, 0.9, 0.05, 0.01)
  weights, at = jax.jit(lambda: psa_jax.sparse_poly_softmax(x, 4, cubic))()
  for row, w, i in zip(x, np.asarray(weights), np.asarray(at), strict=True):
    kept = np.sort(np.argsort(-row)[:4])
    e = [
      math.exp(sum(c * s**p for p, c in enumerate(cubic))) for s in row[kept]
    ]
    np.testing.assert_array_equal(i, kept)
    np.testing.assert_allclose(w, np.array(e) / sum(e), rtol=1e-5)
