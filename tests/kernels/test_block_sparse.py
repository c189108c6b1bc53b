"""Block-list attention against the float64 definition, over awkward shapes."""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels import platform, softmax
from psa_jax.kernels.block_sparse import (
  IMPLEMENTATIONS,
  block_sparse_attention,
  xla_keys,
)
from psa_jax.kernels.block_sparse import xla as xla_module
from psa_jax.kernels.block_sparse.api import Spec
from tests import oracles, tiers

# Kernels for one machine are refused here and have tests of their own.
PORTABLE = [name for name in IMPLEMENTATIONS if not name.startswith('pallas')]

# name: B, T, S, N, K, H, Hv, block_q, block_k, segments, q_offset, causal
CASES = {
  'plain': (2, 64, 64, 2, 1, 16, 16, 16, 8, False, 0, True),
  'odd lengths': (1, 77, 77, 2, 2, 16, 16, 16, 8, False, 0, True),
  'shorter than a block': (1, 5, 5, 2, 1, 16, 16, 16, 8, False, 0, True),
  'wide values': (1, 40, 40, 3, 3, 24, 16, 8, 16, False, 0, True),
  'narrow values': (1, 40, 40, 2, 1, 16, 24, 8, 16, True, 0, True),
  'H = 72': (1, 33, 33, 2, 1, 72, 72, 16, 16, False, 0, True),
  'prefill chunk': (1, 24, 61, 4, 2, 16, 16, 8, 8, True, 37, True),
  'per token': (1, 19, 19, 4, 1, 16, 16, 1, 8, False, 0, True),
  'bidirectional': (1, 30, 45, 2, 1, 16, 16, 8, 8, False, 0, False),
  'G = 3': (1, 32, 32, 3, 1, 16, 16, 8, 8, True, 0, True),
  'G = 16': (1, 32, 32, 16, 1, 8, 8, 8, 8, False, 0, True),
}
# The first three differ in most; the others are one step away from them.
TELLING = ('odd lengths', 'prefill chunk', 'per token')


def make_case(name, seed=0, dtype=jnp.float32):
  B, T, S, N, K, H, Hv, bq, bk, cut, offset, causal = CASES[name]
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  q, k, v = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, Hv)
  tiles, blocks = -(-T // bq), -(-S // bk)
  ids = [rng.permutation(blocks) for _ in range(B * K * tiles)]
  ids = np.stack(ids).reshape(B, K, tiles, blocks)
  counts = rng.integers(0, blocks + 1, size=(B, K, tiles))
  segments = {}
  if cut:
    seg = np.sort(rng.integers(0, 3, size=(B, max(S, offset + T))), 1)
    segments = dict(
      q_segment_ids=jnp.asarray(seg[:, offset : offset + T]),
      kv_segment_ids=jnp.asarray(seg[:, :S]),
    )
  mask = oracles.list_mask(ids, counts, T, S, bq, bk)
  if causal:
    pair = None
    if cut:
      pair = (seg[:, offset : offset + T], seg[:, :S])
    mask &= oracles.causal_mask(B, K, T, S, pair, offset)
  call = functools.partial(
    block_sparse_attention,
    block_ids=jnp.asarray(ids),
    block_counts=jnp.asarray(counts),
    block_q=bq,
    block_k=bk,
    causal=causal,
    q_offset=offset,
    **segments,
  )
  d_out = np.asarray(normal(B, T, N, Hv), np.float64)
  return (q, k, v), call, mask, d_out


@pytest.mark.parametrize('implementation', PORTABLE)
@pytest.mark.parametrize('name', tiers.cases(CASES, quick=TELLING[:2]))
def test_value_and_gradients(name, implementation):
  check_value_and_gradients(name, implementation=implementation)


@pytest.mark.tier('default')
@pytest.mark.parametrize(
  'name', tiers.cases(CASES, quick=(*TELLING, 'G = 3'), tier='all')
)
def test_many_tiles_at_once(name, monkeypatch):
  """What `xla` does on a GPU: groups of tiles, the last one not full."""
  check_many_tiles(name, 8, monkeypatch)


@pytest.mark.tier('default')
def test_many_tiles_at_once_in_one_chunk(monkeypatch):
  check_many_tiles('prefill chunk', 3072, monkeypatch)


def check_many_tiles(name, chunk, monkeypatch):
  monkeypatch.setattr(xla_module, 'CHUNKS', (chunk,))
  rows, keys = CASES[name][7] * CASES[name][3], max(chunk, CASES[name][8])
  room = 3 * rows * min(keys, -(-CASES[name][2] // 8) * 8 + 8)
  monkeypatch.setattr(xla_module, 'SCORES_ON_GPU', room)
  with platform.target('gpu', kind='NVIDIA A100', capability=80):
    check_value_and_gradients(name, implementation='xla')


@pytest.mark.tier('default')
@pytest.mark.parametrize('kind', ['polynomial', 'sas'])
def test_many_tiles_at_once_with_other_kinds(kind, monkeypatch):
  monkeypatch.setattr(xla_module, 'SCORES_ON_GPU', 2**12)
  args, call, _, d_out = make_case('G = 3')
  cubic = jnp.asarray([0.1, 1.0, 0.2, 0.05])
  more = {'coefficients': cubic} if kind == 'polynomial' else {}
  how = softmax.Kind(kind, clamp=1.5)

  def loss(more, *args):
    out, _ = call(*args, implementation='xla', softmax=how, **more)
    return (out * d_out).sum(), out

  step = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
  want = jax.jit(step)(more, *args)
  with platform.target('gpu', kind='NVIDIA A100', capability=80):
    got = jax.jit(lambda *x: step(*x))(more, *args)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    oracles.check_close(x, np.asarray(y), gradient=True)


def check_value_and_gradients(name, **how):
  args, call, mask, d_out = make_case(name)
  rng = np.random.default_rng(1)
  d_lse = rng.normal(size=d_out.shape[:-1])
  call = functools.partial(call, **how)

  def loss(*args):
    out, lse = call(*args)
    some = jnp.isfinite(lse)
    lse_part = jnp.where(some, jnp.where(some, lse, 0) * d_lse, 0).sum()
    return (out * d_out).sum() + lse_part, (out, lse)

  step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  grads, (out, lse) = step(*args)
  want, want_lse = oracles.attention(*args, mask)
  oracles.check_close(out, want, what='out')
  some = np.isfinite(want_lse)
  np.testing.assert_array_equal(np.isfinite(lse), some)
  assert (np.asarray(lse)[~some] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[some], want_lse[some], what='lse')
  want_grads = oracles.attention_grads(
    *args, mask, d_out, np.where(some, d_lse, 0)
  )
  for got, grad, what in zip(grads, want_grads, 'qkv', strict=True):
    oracles.check_close(got, grad, gradient=True, what=f'd{what}')


@pytest.mark.tier('default')
@pytest.mark.parametrize('chunks', [(8,), (24,), (32, 16, 8), (10_000,)])
def test_chunking_changes_nothing(chunks, monkeypatch):
  """The online softmax over chunks, masked or not, the last one partial."""
  monkeypatch.setattr(xla_module, 'CHUNKS', chunks)
  args, call, mask, d_out = make_case('odd lengths')

  def loss(*args):
    out, _ = call(*args, implementation='xla')
    return (out * d_out).sum(), out

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)
  oracles.check_close(out, oracles.attention(*args, mask)[0])
  want = oracles.attention_grads(*args, mask, d_out, np.zeros(d_out.shape[:-1]))
  for got, grad in zip(grads, want, strict=True):
    oracles.check_close(got, grad, gradient=True)


@pytest.mark.tier('default')
@pytest.mark.parametrize('rows', [4, 12, 10_000])
@pytest.mark.parametrize('name', ['per token', 'prefill chunk'])
def test_readers_in_chunks(name, rows, monkeypatch):
  """By key block: chunks of readers, one by one, the last one partial."""
  monkeypatch.setattr(xla_keys, 'ROWS', rows)
  check_value_and_gradients(name, implementation='xla_keys')


@pytest.mark.tier('default')
@pytest.mark.parametrize('kind', ['polynomial', 'sas'])
def test_other_kinds_by_key_block(kind):
  args, call, _, d_out = make_case('per token')
  cubic = jnp.asarray([0.1, 1.0, 0.2, 0.05])
  more = {'coefficients': cubic} if kind == 'polynomial' else {}
  how = softmax.Kind(kind, clamp=1.5)

  def loss(more, *args, implementation):
    out, lse = call(*args, implementation=implementation, softmax=how, **more)
    return (out * d_out).sum(), (out, jnp.where(jnp.isfinite(lse), lse, 0))

  got, want = (
    jax.jit(
      jax.value_and_grad(
        functools.partial(loss, implementation=name), (0, 1, 2, 3), has_aux=True
      )
    )(more, *args)
    for name in ('xla_keys', 'reference')
  )
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    oracles.check_close(x, np.asarray(y), gradient=True)


def test_lists_of_a_token_go_by_key_block():
  """`auto` on a CPU; a tile with many rows goes by query tile."""
  for name, block_k, machine, slower in (
    ('per token', 16, 'cpu', False),
    ('per token', 16, 'gpu', True),
    ('per token', 8, 'cpu', True),
    ('G = 16', 16, 'cpu', True),
  ):
    args, call, *_ = make_case(name)
    spec = Spec(call.keywords['block_q'], block_k, True, None, 0, 1.0)
    where = platform.Target(machine)
    assert xla_keys.slower(where, *args, spec=spec) == slower, (name, machine)


@pytest.mark.tier('default')
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_low_precision_inputs_accumulate_in_f32(dtype):
  args, call, mask, d_out = make_case('plain', dtype=jnp.dtype(dtype))

  def loss(*args):
    out, lse = call(*args)
    return (out.astype(jnp.float32) * d_out).sum(), (out, lse)

  step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  grads, (out, lse) = step(*args)
  assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
  oracles.check_close(
    out.astype(jnp.float32), oracles.attention(*args, mask)[0], dtype
  )
  want = oracles.attention_grads(*args, mask, d_out, np.zeros(d_out.shape[:-1]))
  for got, grad in zip(grads, want, strict=True):
    assert got.dtype == jnp.dtype(dtype)
    got = got.astype(jnp.float32)
    oracles.check_close(got, grad, dtype, gradient=True)


def test_window_cuts_single_keys():
  args, call, mask, _ = make_case('odd lengths')
  t = np.arange(77)
  near = (t[None] > t[:, None] - 13)[None, None]
  want, _ = oracles.attention(*args, mask & near)
  for implementation in PORTABLE:
    how = dict(window=13, implementation=implementation)
    out, _ = jax.jit(functools.partial(call, **how))(*args)
    oracles.check_close(out, want)


def test_entries_past_the_count_are_not_read():
  """Garbage after the count, out of range or duplicate, changes no bit."""
  (q, k, v), call, _, d_out = make_case('plain')
  ids, counts = call.keywords['block_ids'], call.keywords['block_counts']
  past = jnp.arange(ids.shape[-1])[None, None, None] >= counts[..., None]

  def loss(q, k, v, ids):
    return (call(q, k, v, block_ids=ids)[0] * d_out).sum()

  grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  want = grad(q, k, v, ids)
  for garbage in (0, -7, 10**6):
    got = grad(q, k, v, jnp.where(past, garbage, ids))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, want))


def test_unlisted_keys_have_no_influence():
  """Changing keys and values outside every list changes no bit."""
  (q, k, v), call, _, _ = make_case('plain', seed=3)
  call = functools.partial(
    call, block_counts=jnp.minimum(call.keywords['block_counts'], 1)
  )
  ids = np.asarray(call.keywords['block_ids'])
  counts = np.asarray(call.keywords['block_counts'])
  mask = oracles.list_mask(ids, counts, 64, 64, 16, 8)
  unread = jnp.asarray(~mask.any((1, 2)))[..., None, None]
  assert unread.any()
  call = jax.jit(call)
  other = call(q, jnp.where(unread, 9, k), jnp.where(unread, 1e6, v))
  for got, want in zip(other, call(q, k, v), strict=True):
    np.testing.assert_array_equal(got, want)


def test_counts_change_without_compiling_again():
  args, call, _, _ = make_case('plain')
  traces = []

  @jax.jit
  def run(counts, *args):
    traces.append(1)
    return call(*args, block_counts=counts)[0]

  full = call.keywords['block_ids'].shape[-1]
  shape = call.keywords['block_counts'].shape
  outs = [run(jnp.full(shape, n), *args) for n in range(full + 1)]
  assert len(traces) == 1
  assert (np.asarray(outs[0]) == 0).all()
  assert not np.array_equal(outs[1], outs[full])


@hypothesis.given(
  seed=st.integers(0, 2**31),
  most=st.integers(0, 8),
  documents=st.integers(1, 6),
  T=st.sampled_from([1, 37, 64]),
)
def test_random_lists(seed, most, documents, T):
  """Random lists, counts, segments and lengths against the definition."""
  rng = np.random.default_rng(seed)
  B, K, block_q, block_k = 2, 1, 16, 8
  tiles, blocks = -(-T // block_q), -(-T // block_k)
  q, d_out = (
    jnp.asarray(rng.normal(size=(B, T, 2, 16)), jnp.float32) for _ in 'qo'
  )
  k, v = (
    jnp.asarray(rng.normal(size=(B, T, K, 16)), jnp.float32) for _ in 'kv'
  )
  ids = [rng.permutation(blocks) for _ in range(B * K * tiles)]
  ids = np.stack(ids).reshape(B, K, tiles, blocks)
  counts = rng.integers(0, min(most, blocks) + 1, size=(B, K, tiles))
  seg = np.sort(rng.integers(0, documents, size=(B, T)), 1)
  mask = oracles.list_mask(ids, counts, T, T, block_q, block_k)
  mask &= oracles.causal_mask(B, K, T, T, (seg, seg))
  out, grads = _value_and_grads(
    (q, k, v), d_out, *map(jnp.asarray, (ids, counts, seg))
  )
  oracles.check_close(out, oracles.attention(q, k, v, mask)[0])
  want = oracles.attention_grads(
    q, k, v, mask, d_out, np.zeros(d_out.shape[:-1])
  )
  # Together: a query with a single key has dq = 0, but for rounding.
  got, want = (
    np.concatenate([np.ravel(x) for x in xs]) for xs in (grads, want)
  )
  oracles.check_close(got, want, gradient=True)


@jax.jit
def _value_and_grads(args, d_out, ids, counts, seg):
  def attend(*args):
    return block_sparse_attention(
      *args,
      ids,
      counts,
      block_q=16,
      block_k=8,
      q_segment_ids=seg,
      kv_segment_ids=seg,
    )[0]

  out, pull = jax.vjp(attend, *args)
  return out, pull(d_out)


def test_errors_name_the_shapes():
  (q, k, v), call, _, _ = make_case('plain')
  # Past the run-time shape check that only tests switch on.
  call = functools.partial(inspect.unwrap(call.func), **call.keywords)
  with pytest.raises(ValueError, match='differ in head width'):
    call(q[..., :8], k, v)
  with pytest.raises(ValueError, match='not a multiple of 2 kv heads'):
    pair = jnp.concatenate([k, k], 2)
    three = jnp.concatenate([q, q[:, :, :1]], 2)
    call(three, pair, jnp.concatenate([v, v], 2))
  with pytest.raises(ValueError, match='block_ids'):
    call(q, k, v, block_counts=call.keywords['block_counts'][:, :, :1])
  with pytest.raises(ValueError, match='unknown implementation'):
    call(q, k, v, implementation='cuda')
  with pytest.raises(ValueError, match='neither'):
    call(q, k, v, q_segment_ids=jnp.zeros((2, 64), jnp.int32))
  with pytest.raises(ValueError, match='window=0'):
    call(q, k, v, window=0)
