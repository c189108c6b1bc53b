"""What a query does not read changes no bit of what it gives, NaN included.

Keys and values are NaN or infinite in some places, and so are the queries that
read one. Output and log-sum-exp of the other rows, and all gradients of a loss
of these only, must have the bits that zeros in their place give. A row that
reads one must be NaN.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import compressed, indexer, platform, unread
from psa_jax.kernels.block_sparse import xla as block_sparse_xla
from psa_jax.kernels.compressed import api as compressed_api
from psa_jax.kernels.compressed import stacked
from psa_jax.kernels.compressed import xla as compressed_xla
from psa_jax.kernels.dense import cudnn, dense_attention, pallas_tpu
from psa_jax.kernels.dense.few_values import few_values_attention
from psa_jax.kernels.linear_attention import linear_attention
from psa_jax.kernels.topk_attention import topk_attention
from tests import oracles, tiers
from tests.attention import nsa_oracle
from tests.kernels import (
  test_block_sparse,
  test_decode,
  test_decode_tpu,
  test_dense,
  test_dense_accelerators,
  test_indexer,
)

TPU = functools.partial(platform.target, 'tpu', kind='v5e', interpret=True)
CUBIC = (0.3, 0.8, -0.2, 0.05)


def check(call, args, mask, mask_v=None, *, gradients=True, share=0.04):
  """See the module's docstring.

  Args:
    call: from q, k, v to output and log-sum-exp, or None.
    args: q, k, v.
    mask: [B, K or N, T, S] which keys a query reads.
    mask_v: likewise of values; None means the same ones.
    gradients: whether there are any.
    share: of the keys that is not finite, and all that no query reads.
  """
  q, k, v = args
  (B, T, N, _), (_, S, K, _) = q.shape, k.shape
  rng = np.random.default_rng(5)
  mask, mask_v = (
    np.repeat(x, N // x.shape[1], 1)
    for x in (mask, mask if mask_v is None else mask_v)
  )
  bads, reads = [], np.zeros((B, N, T), bool)
  for m in (mask, mask_v):
    nobody = ~m.reshape(B, K, -1, S).any(2)
    bad = nobody | (rng.random((B, K, S)) < share)
    reads |= (m & np.repeat(bad, N // K, 1)[:, :, None]).any(-1)
    bads.append(np.moveaxis(bad, 1, 2))
  bad_k, bad_v = bads
  reads = np.moveaxis(reads, 1, 2)
  empty = np.moveaxis(~mask.any(-1), 1, 2)
  assert bad_k.any() and (~reads & ~empty).any() and reads.any() == (share > 0)
  d_out = rng.normal(size=(*q.shape[:3], v.shape[-1])).astype(np.float32)
  d_lse = rng.normal(size=q.shape[:3]).astype(np.float32)

  def loss(*args):
    out, lse = call(*args)
    kept = jnp.where(reads[..., None], 0, out)
    total = (kept.astype(jnp.float32) * d_out).sum()
    if lse is not None:
      total += (jnp.where(reads | empty, 0, lse) * d_lse).sum()
    return total, (out, lse)

  step = jax.grad(loss, (0, 1, 2), has_aux=True)
  step = jax.jit(step if gradients else lambda *args: ((), loss(*args)[1]))

  def run(values):
    places = ((q, reads), (k, bad_k), (v, bad_v))
    return step(
      *(
        jnp.where(at[..., None], rng.choice(values, x.shape), x)
        for x, at in places
      )
    )

  want, (want_out, want_lse) = run([np.float32(0)])
  got, (out, lse) = run(np.float32([np.nan, np.inf, -np.inf]))
  np.testing.assert_array_equal(out[~reads], want_out[~reads])
  assert np.isnan(out[reads]).all()
  if lse is not None:
    np.testing.assert_array_equal(lse[~reads], want_lse[~reads])
    assert np.isnan(lse[reads]).all()
  for grad, wanted, what in zip(got, want, 'qkv', strict=gradients):
    np.testing.assert_array_equal(grad, wanted, what)


BLOCK_SPARSE = [
  ('xla', 'odd lengths', {}),
  ('xla', 'prefill chunk', dict(window=9)),
  ('xla', 'wide values', dict(softmax='sas')),
  ('xla', 'narrow values', dict(softmax='polynomial', coefficients=CUBIC)),
  ('xla_keys', 'prefill chunk', dict(window=9)),
  ('xla_keys', 'narrow values', dict(softmax='polynomial', coefficients=CUBIC)),
  ('reference', 'prefill chunk', dict(window=9)),
  ('pallas_tpu', 'prefill chunk', dict(window=9)),
  ('pallas_tpu', 'narrow values', dict(softmax='sas')),
]


@pytest.mark.parametrize(
  ('implementation', 'name', 'more'),
  tiers.cases(BLOCK_SPARSE, quick=BLOCK_SPARSE[:1]),
)
def test_block_sparse_attention(implementation, name, more, monkeypatch):
  monkeypatch.setattr(block_sparse_xla, 'CHUNKS', (32, 8))
  args, call, mask, _ = test_block_sparse.make_case(name)
  if 'window' in more:
    t = np.arange(mask.shape[2])[:, None] + call.keywords['q_offset']
    mask &= np.arange(mask.shape[3])[None] > t - more['window']
  if 'coefficients' in more:
    more = more | dict(coefficients=jnp.asarray(CUBIC, jnp.float32))
  call = functools.partial(call, implementation=implementation, **more)
  on_tpu = implementation == 'pallas_tpu'
  with TPU() if on_tpu else contextlib.nullcontext():
    check(call, args, mask)


DENSE = [
  ('xla', 'odd lengths', False),
  ('xla', 'documents', True),
  ('xla', 'prefill chunk', False),
  ('reference', 'documents', True),
  ('pallas_tpu', 'documents', False),
]


@pytest.mark.parametrize(
  ('implementation', 'name', 'short'), tiers.cases(DENSE, quick=DENSE[:1])
)
def test_dense_of(implementation, name, short, monkeypatch):
  if not short:
    test_dense.use_small_tiles(monkeypatch)
  monkeypatch.setattr(pallas_tpu, 'BLOCK_WIDE', 128)
  B, T, S, N, K, H, Hv, cut, offset, causal = test_dense.CASES[name]
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv)
  args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  pair, segments = None, {}
  if cut:
    seg = np.sort(rng.integers(0, 3, size=(B, offset + T)), 1)
    pair = seg[:, offset:], seg[:, :S]
    segments = dict(q_segment_ids=pair[0], kv_segment_ids=pair[1])
  call = functools.partial(
    dense_attention,
    causal=causal,
    q_offset=offset,
    implementation=implementation,
    **{name: jnp.asarray(x) for name, x in segments.items()},
  )
  mask = oracles.causal_mask(B, K, T, S, pair, offset)
  on_tpu = implementation == 'pallas_tpu'
  with TPU() if on_tpu else contextlib.nullcontext():
    check(call, args, mask)


@pytest.mark.tier('default')
@pytest.mark.parametrize('causal', [True, False])
def test_cudnn(causal, monkeypatch):
  """With a stand-in that gives NaN everywhere if there is one anywhere."""

  def fused(q, k, v, **kw):
    out, lse = test_dense_accelerators.stand_in(q, k, v, **kw)
    spoilt = sum((x - x).sum() for x in (q, k, v))
    return out + spoilt, lse + spoilt

  monkeypatch.setattr(
    test_dense_accelerators.fused, 'dot_product_attention', fused
  )
  rng = np.random.default_rng(0)
  args = [jnp.asarray(rng.normal(size=(2, 30, n, 8)), 'f4') for n in (4, 2, 2)]
  mask = oracles.causal_mask(2, 2, 30, 30)
  mask = mask if causal else np.ones_like(mask)
  spec = test_dense_accelerators.cudnn_spec(causal=causal, scale=8**-0.5)

  def call(q, k, v):
    k, v = unread.mark(k, v)
    return cudnn.dense_attention(q, k, v, None, spec=spec)

  check(call, args, mask, share=0.02 if causal else 0.005)


@pytest.mark.tier('default')
@pytest.mark.parametrize('name', ['xla', 'stacked', 'reference'])
def test_compressed(name, monkeypatch):
  monkeypatch.setattr(compressed_xla, 'ROWS', 16)
  monkeypatch.setattr(compressed_xla, 'KEYS', 5)
  sizes, T = nsa_oracle.Sizes(l=6, d=2, select=12, n=3, w=1), 41
  segments = np.searchsorted([9, 16], np.arange(T), 'right')[None].repeat(2, 0)
  starts = jnp.asarray([0, 9, 16])[segments]
  shapes = (2, T, 4, 8), (2, 18, 2, 8), (2, 18, 2, 6)
  rng = np.random.default_rng(0)
  args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  spec = compressed_api.Spec(6, 2, 8**-0.5)

  def call(q, k, v):
    if name == 'stacked':  # by name it is refused on a CPU
      k, v = unread.mark(k, v)
      return stacked.compressed_attention(q, k, v, starts, spec=spec)
    return compressed.compressed_attention(
      q, k, v, block=6, stride=2, starts=starts, implementation=name
    )

  mask = nsa_oracle.compress_mask(2, 2, T, sizes, segments.tolist())
  check(call, args, mask)


@pytest.mark.parametrize(
  ('implementation', 'name'),
  tiers.cases(
    [
      ('xla', 'three queries'),
      ('xla', 'window and documents'),
      ('reference', 'window and documents'),
    ],
    quick=[('xla', 'window and documents')],
  ),
)
def test_decoding(implementation, name):
  args, call, mask = test_decode.make_case(name)
  call = functools.partial(call, implementation=implementation)
  check(call, args, mask, gradients=False)


@pytest.mark.tier('default')
def test_decoding_on_tpu():
  args, call, mask = test_decode_tpu.make_case('in place')
  with TPU():
    check(call, args, mask, gradients=False, share=0)


@pytest.mark.tier('default')
@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('op', ['topk', 'few values'])
def test_values_that_nobody_keeps(op, implementation):
  """Of a key that is seen the value is read only where it is kept."""
  B, T, N, K, H, Hv = 2, 30, 4, 2, 8, 6
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, Hv)
  q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  end = np.tile(np.arange(1, T + 1), (B, 1))
  begin = np.where(end > 17, 17, 0)
  counts = np.minimum(end - begin, 3)
  pos = np.arange(T)
  seen = (pos >= begin[..., None]) & (pos < end[..., None])
  scores = np.einsum('btkgh,bskh->bkgts', q.reshape(B, T, K, 2, H), k)
  scores = np.where(seen[:, None, None], scores, -np.inf)
  least = np.sort(scores, -1)[..., ::-1]
  least = np.take_along_axis(least, counts[:, None, None, :, None] - 1, -1)
  kept = (scores >= least).reshape(B, N, T, T)

  def call(q, k, v):
    if op == 'topk':
      coefficients = jnp.asarray((0.0, 1.0, 0.0, 0.0))
      out = topk_attention(
        q,
        k,
        v,
        coefficients,
        begin=jnp.asarray(begin),
        end=jnp.asarray(end),
        counts=jnp.asarray(counts),
        causal=True,
        implementation=implementation,
      )
      return out, None
    seg = jnp.asarray(begin)
    return few_values_attention(
      q,
      k,
      v,
      jnp.asarray(counts),
      q_segment_ids=seg,
      kv_segment_ids=seg,
      implementation=implementation,
    )

  check(call, (q, k, v), seen[:, None], kept)


@pytest.mark.tier('default')
@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('causal', [True, False])
def test_linear_attention(causal, implementation):
  B, T, N, K, H = 2, 150, 4, 2, 4  # more than a chunk
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
  args = [jnp.asarray(rng.uniform(size=s), jnp.float32) for s in shapes]
  seg = np.sort(rng.integers(0, 30, size=(B, T)), 1)
  mask = (seg[:, None, :, None] == seg[:, None, None, :]) & np.ones(
    (B, K, T, T), bool
  )
  if causal:
    mask = np.tril(mask)

  def call(*args):
    run = functools.partial(linear_attention, implementation=implementation)
    return run(*args, causal=causal, segment_ids=jnp.asarray(seg)), None

  check(call, args, mask)


@pytest.mark.tier('default')
def test_divergence():
  """The index, queries and keys of another document are NaN."""
  index, q, k = test_indexer.arrays()
  seg, (ids, counts) = test_indexer.documents(), test_indexer.lists()
  mask = test_indexer.listed(ids, counts, seg)
  lse = test_indexer.log_sums(q, k, mask)
  mine = seg == 3

  @jax.jit
  def run(index, q, k, lse):
    def loss(index):
      kl = indexer.divergence(
        index,
        q,
        k,
        lse,
        ids,
        counts,
        block_q=test_indexer.BLOCK_Q,
        block_k=test_indexer.BLOCK_K,
        segment_ids=seg,
      )
      return jnp.where(mine, kl, 0).sum(), kl

    return jax.grad(loss, has_aux=True)(index)

  def filled(value):
    def fill(x):
      return jnp.where(mine.reshape(mine.shape + (1,) * (x.ndim - 2)), x, value)

    return run(*jax.tree.map(fill, (index, q, k, lse)))

  want, want_kl = filled(0.0)
  for value in (np.nan, np.inf):
    got, kl = filled(value)
    np.testing.assert_array_equal(kl[mine], want_kl[mine])
    assert np.isnan(kl[~mine]).all()
    jax.tree.map(np.testing.assert_array_equal, got, want)
