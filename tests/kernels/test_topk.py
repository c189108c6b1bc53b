"""Selection without sorting against NumPy's stable sort."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import platform, topk
from psa_jax.kernels.topk import image, words
from psa_jax.kernels.topk import xla as xla_module
from tests import tiers

TIER = pytest.mark.tier
INT_MAX = 2**31 - 1
# Where each implementation runs here: the TPU kernel in Pallas's interpreter,
# with the TPU's own way of packing and compacting.
TARGETS = {
  'reference': platform.Target('cpu'),
  'xla': platform.Target('cpu'),
  'xla for tpu': platform.Target('tpu'),
  'pallas_tpu': platform.Target('tpu', interpret=True),
}
ON_TPU = ('xla for tpu', 'pallas_tpu')
every = pytest.mark.parametrize(
  'name', tiers.cases(TARGETS, quick=('reference', 'xla'))
)


def on(name, function, *args, **kwargs):
  """`function` with the implementation of a row of TARGETS."""
  where = TARGETS[name]
  with platform.target(where.platform, interpret=where.interpret):
    return function(*args, implementation=name.split()[0], **kwargs)


def oracle(row, k):
  """Positions of the k largest entries, ascending: a stable descending sort.

  Python numbers order the entries: (is NaN, value), equal ones by position.
  """
  row = [float(v) if np.asarray(row).dtype != np.int32 else int(v) for v in row]
  rank = [(v != v, 0 if v != v else v) for v in row]
  order = sorted(range(len(row)), key=lambda i: rank[i], reverse=True)
  return sorted(order[: max(0, int(k))])


@functools.cache
def compiled(name, max_k):
  """All three functions with a traced k."""

  def call(x, k):
    run = functools.partial(on, name, x=x, k=k, max_k=max_k)
    return run(topk.top_k), run(topk.select), run(topk.threshold)

  return jax.jit(call)


def check(name, x, k, max_k):
  """All three functions on [rows, n] and k: an int or [rows]."""
  x = jnp.asarray(x)
  R, n = x.shape
  ks = np.broadcast_to(np.asarray(k, np.int32), (R,))
  got, mask, cut = compiled(name, max_k)(x, ks)
  assert got.values.shape == got.indices.shape == (R, max_k)
  assert got.values.dtype == cut.dtype == x.dtype
  assert got.indices.dtype == got.count.dtype == jnp.int32
  x, cut, count, mask = (np.asarray(a) for a in (x, cut, got.count, mask))
  values, indices = np.asarray(got.values), np.asarray(got.indices)
  for r in range(R):
    size = min(int(ks[r]), n, max_k)
    want = oracle(x[r], size)
    assert count[r] == size == len(want)
    assert indices[r].tolist() == want + [n] * (max_k - size)
    assert np.flatnonzero(mask[r]).tolist() == want
    np.testing.assert_array_equal(values[r, :size], x[r, want])
    assert not values[r, size:].any()
    if size:
      kept = x[r, want]
      numbers = kept[kept == kept]
      smallest = numbers.min() if numbers.size else np.nan
      np.testing.assert_array_equal(cut[r], smallest)


@st.composite
def problems(draw):
  """Rows full of ties and special values, and k from 0 to n."""
  R, n = 5, draw(st.sampled_from([1, 40, 131]))
  special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, -1.5, 1e-40]
  numbers = st.one_of(
    st.integers(-3, 3).map(float),
    st.sampled_from(special),
    st.floats(-(2.0**100), 2.0**100, width=32),
  )
  x = draw(hnp.arrays(np.float32, (R, n), elements=numbers, fill=numbers))
  return x, draw(hnp.arrays(np.int32, (R,), elements=st.integers(0, n)))


@every
@hypothesis.given(problem=problems())
def test_equals_a_stable_sort(name, problem):
  """Ties, infinities, zeros of both signs, NaN; k traced and one a row."""
  x, k = problem
  check(name, x, k, max_k=x.shape[1])


ROWS = {
  'random': lambda rng, n: rng.normal(size=n),
  'ties': lambda rng, n: rng.integers(-3, 3, size=n),
  'all equal': lambda rng, n: np.full(n, 2.5),
  'two values': lambda rng, n: rng.choice([-1.0, 7.0], size=n),
  'ascending': lambda rng, n: np.arange(n),
  'descending': lambda rng, n: -np.arange(n),
  # Every large entry in one of the interleaved groups: the bound fails.
  'one group': lambda rng, n: (
    np.where(np.arange(n) % 128 == 3, 1, 0) * (1 + rng.random(n))
  ),
  'infinities': lambda rng, n: rng.choice([np.inf, -np.inf, 1.0], size=n),
  'all -inf': lambda rng, n: np.full(n, -np.inf),
  'all NaN': lambda rng, n: np.full(n, np.nan),
}


@TIER('default')
@every
def test_rows_of_every_kind(name):
  """Long enough for group maxima and candidates; k from 0 to n."""
  rng = np.random.default_rng(0)
  x = np.stack([make(rng, 1024) for make in ROWS.values()]).astype(np.float32)
  assert xla_module.group_size(1024, 64) >= xla_module.MIN_GROUP
  for k in (0, 1, 5, 64):
    check(name, x, k, max_k=64)
  for k in (600, 1024):
    check(name, x, k, max_k=1024)


def _dtypes():
  """A kernel sees the order as integers: two dtypes tell whether it is kept."""
  for name in TARGETS:
    for dtype in image.DTYPES:
      seldom = name in ON_TPU and dtype in ('float32', 'float16')
      yield pytest.param(
        name, dtype, marks=TIER('all' if seldom else 'default')
      )


@pytest.mark.parametrize(('name', 'dtype'), list(_dtypes()))
def test_dtypes(name, dtype):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(3, 300)) * 4
  if dtype == 'int32':
    x = rng.integers(-(2**31), 2**31, size=(3, 300))
    x[1, ::7], x[2, ::2] = INT_MAX, -(2**31)
  for k in (3, 170, 300):
    check(name, jnp.asarray(x, dtype), k, max_k=300)


@TIER('default')
@pytest.mark.parametrize('name', TARGETS)
def test_k_differs_by_row_and_is_clipped(name):
  x = np.random.default_rng(2).normal(size=(5, 150)).astype(np.float32)
  check(name, x, [0, 1, 4, 9, 150], max_k=9)
  check(name, x, [200, 3, 150, 149, 2], max_k=160)
  got, mask, _ = compiled(name, 9)(x, np.full(5, -4, np.int32))
  assert not got.count.any() and not mask.any()
  assert (got.indices == 150).all()


@TIER('default')
def test_leading_axes_and_broadcast_k():
  x = jax.random.normal(jax.random.key(0), (2, 3, 40))
  k = jnp.array([[1], [7]])
  got = jax.jit(lambda x, k: topk.top_k(x, k, max_k=8))(x, k)
  assert got.indices.shape == (2, 3, 8) and got.count.shape == (2, 3)
  for b, h in np.ndindex(2, 3):
    size = int(k[b, 0])
    want = oracle(np.asarray(x)[b, h], size)
    assert got.indices[b, h, :size].tolist() == want
    np.testing.assert_array_equal(
      got.values[b, h, :size], np.asarray(x)[b, h, want]
    )
  mask = jax.jit(topk.select)(x, k)
  assert mask.sum(-1).tolist() == [[1] * 3, [7] * 3]
  alone = jax.jit(lambda x: topk.threshold(x, 1))(x[0, 0])
  assert alone.shape == () and alone == x[0, 0].max()


@TIER('default')
def test_a_static_k_sets_the_width():
  """Also one above n."""
  x = np.random.default_rng(7).integers(-9, 9, size=(3, 50))
  x = jnp.asarray(x, jnp.int32)
  for k in (0, 1, 60):
    got = jax.jit(lambda x, k=k: topk.top_k(x, k))(x)
    assert got.values.shape == got.indices.shape == (3, k)
    assert got.count.tolist() == [min(k, 50)] * 3
    for r in range(3):
      want = oracle(np.asarray(x)[r], k)
      assert got.indices[r].tolist() == want + [50] * (k - len(want))


@TIER('default')
@pytest.mark.parametrize('name', ['xla', 'pallas_tpu'])
def test_a_traced_k_compiles_once(name):
  traces = []

  @jax.jit
  def call(x, k):
    traces.append(1)
    return on(name, topk.top_k, x, k, max_k=20)

  x = jax.random.normal(jax.random.key(1), (4, 200))
  for k in (0, 3, 20):
    got = call(x, jnp.int32(k))
    assert (got.indices < 200).sum() == 4 * k
  assert len(traces) == 1


@TIER('default')
@pytest.mark.parametrize(
  'name', tiers.cases(['xla', 'pallas_tpu'], quick=['xla'], tier='all')
)
def test_eager_equals_jit(name):
  x = jax.random.normal(jax.random.key(1), (4, 200))
  run = functools.partial(on, name, topk.top_k, max_k=20)
  eager, got = run(x, jnp.int32(20)), jax.jit(run)(x, jnp.int32(20))
  jax.tree.map(np.testing.assert_array_equal, got, eager)


@TIER('default')
def test_threshold_of_no_entries_is_the_largest_value():
  x = jnp.array([[1.0, jnp.nan], [3.0, 2.0]])
  assert topk.threshold(x, jnp.array([0, 5])).tolist() == [np.inf, 2.0]
  assert topk.threshold(jnp.array([4], jnp.int32), 0) == INT_MAX


@TIER('default')
def test_the_set_is_that_of_lax_top_k():
  """Where no entries are equal; the order differs by design."""
  x = jax.random.normal(jax.random.key(2), (6, 4096))
  values, indices = jax.lax.top_k(x, 100)
  got = jax.jit(lambda x: topk.top_k(x, 100))(x)
  np.testing.assert_array_equal(got.indices, jnp.sort(indices))
  np.testing.assert_array_equal(jnp.sort(got.values), jnp.sort(values))
  nan = jnp.array([1.0, jnp.nan, jnp.inf, 0.0])
  assert jax.lax.top_k(nan, 1)[1].tolist() == [1]
  got = jax.jit(lambda x: topk.top_k(x, 1))(nan)
  assert got.indices.tolist() == [1]


@TIER('default')
@pytest.mark.parametrize('name', ['reference', 'xla', 'pallas_tpu'])
def test_gradient_reaches_the_survivors_only(name):
  x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 90)), jnp.float32)
  weights = jnp.arange(1.0, 8.0)
  k = jnp.array([7, 2, 0])

  def loss(x):
    got = on(name, topk.top_k, x, k, max_k=7)
    return (got.values * weights[None]).sum()

  grad = np.asarray(jax.jit(jax.grad(loss))(x))
  want = np.zeros((3, 90))
  for r in range(3):
    want[r, oracle(np.asarray(x[r]), k[r])] = weights[: int(k[r])]
  np.testing.assert_array_equal(grad, want)

  def smallest(x):
    return on(name, topk.threshold, x, 3).sum()

  assert not np.asarray(jax.jit(jax.grad(smallest))(x)).any()


@TIER('default')
def test_under_vmap():
  x = jax.random.normal(jax.random.key(4), (3, 2, 600)).round(1)
  whole = functools.partial(topk.top_k, k=9)
  got = jax.jit(jax.vmap(whole))(x)
  jax.tree.map(np.testing.assert_array_equal, got, jax.jit(whole)(x))


@TIER('ci')
def test_kernel_races_and_bounds():
  """Pallas's TPU simulator: out-of-bounds and uninitialised reads, races."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  x = jnp.asarray(np.random.default_rng(5).integers(0, 9, size=(9, 200)))
  with platform.target(
    'tpu', interpret=pltpu.InterpretParams(detect_races=True)
  ):
    got = topk.top_k(x, 11, implementation='pallas_tpu')
  want = [oracle(row, 11) for row in np.asarray(x)]
  np.testing.assert_array_equal(got.indices, want)
  assert not interpret_pallas_call.races.races_found


@TIER('default')
@pytest.mark.parametrize('dtype', image.DTYPES)
@pytest.mark.parametrize('name', ['tpu', 'cuda'])
def test_lowering(name, dtype):
  """What `auto` takes on an accelerator lowers for it."""
  x = jax.ShapeDtypeStruct((12, 5000), dtype)
  k = jax.ShapeDtypeStruct((12,), jnp.int32)
  kind = 'gpu' if name == 'cuda' else name
  with platform.target(kind, capability=90 if kind == 'gpu' else 0):
    traced = jax.jit(lambda x, k: topk.top_k(x, k, max_k=64)).trace(x, k)
    text = traced.lower(lowering_platforms=(name,)).as_text()
  assert ('tpu_custom_call' in text) == (name == 'tpu')


def test_refusals():
  x = jnp.zeros((2, 8))
  with pytest.raises(ValueError, match='Mosaic kernel for TPUs'):
    topk.top_k(x, 2, implementation='pallas_tpu')
  with (
    platform.target('tpu'),
    pytest.raises(ValueError, match='do not fit VMEM'),
  ):
    topk.select(jnp.zeros((1, 400_000)), 2, implementation='pallas_tpu')
  with pytest.raises(ValueError, match='give max_k'):
    topk.top_k(x, jnp.int32(2))
  with pytest.raises(ValueError, match='k=-1 must be >= 0'):
    topk.select(x, -1)
  with pytest.raises(ValueError, match='cast it to one of'):
    topk.select(x.astype(jnp.int8), 1)
  with pytest.raises(ValueError, match='no entries'):
    topk.select(x[:, :0], 1)


@TIER('default')
def test_words():
  """Both ways to pack and to compact, against NumPy."""
  rng = np.random.default_rng(6)
  for n in (1, 31, 32, 129, 700):
    mask = rng.random((4, n)) < np.array([[0], [0.1], [0.9], [1]])
    plain = np.packbits(mask, axis=1, bitorder='little')
    plain = np.pad(plain, ((0, 0), (0, -plain.shape[1] % 4))).view('<u4')
    for kind in ('cpu', 'tpu'):
      with platform.target(kind):
        packed = jax.jit(words.pack)(mask)
        compact = functools.partial(words.compact, width=40, filler=n)
        got = jax.jit(compact)(packed)
      np.testing.assert_array_equal(packed, plain)
      for r in range(4):
        want = np.flatnonzero(mask[r])[:40].tolist()
        assert np.asarray(got)[r].tolist() == want + [n] * (40 - len(want))


@TIER('default')
def test_image_keeps_the_order_and_comes_back():
  for dtype in ('float32', 'bfloat16', 'float16'):
    x = jnp.array([-jnp.inf, -3.5, -1.0, -1e-6, 0.0, 1e-6, 2.0, jnp.inf], dtype)
    images = image.ordered(x)
    assert (jnp.diff(images) > 0).all()
    np.testing.assert_array_equal(image.restore(images, x.dtype), x)
    same = image.ordered(jnp.array([-0.0, 0.0, jnp.nan, -jnp.nan], dtype))
    assert same[0] == same[1] and same[2] == same[3] > images[-1]
    assert jnp.isnan(image.restore(same[2], x.dtype))
