"""Decoding by block list against the float64 definition and against prefill."""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.kernels.block_sparse import block_sparse_attention
from psa_jax.kernels.decode import IMPLEMENTATIONS, decode_attention
from psa_jax.kernels.decode import xla as xla_module
from tests import oracles, tiers

# name: T, S, N, K, H, Hv, block_k, window, starts
CASES = {
  'one query': (1, 64, 2, 1, 16, 16, 8, None, False),
  'three queries': (3, 64, 2, 1, 16, 16, 8, None, False),
  'G = 1': (1, 64, 2, 2, 16, 16, 8, None, False),
  'G = 3': (3, 40, 6, 2, 8, 8, 8, None, False),
  'G = 8': (1, 40, 8, 1, 8, 8, 8, None, False),
  'wide values': (1, 48, 2, 1, 8, 24, 16, None, False),
  'narrow values': (3, 48, 2, 1, 24, 8, 16, None, True),
  'partial last block': (3, 61, 4, 2, 16, 16, 8, None, False),
  'cache of one partial block': (1, 5, 2, 1, 16, 16, 8, None, False),
  'window': (3, 61, 2, 1, 16, 16, 8, 11, False),
  'documents': (3, 61, 2, 1, 16, 16, 8, None, True),
  'window and documents': (1, 64, 4, 2, 16, 16, 16, 20, True),
  'blocks of one key': (1, 20, 2, 1, 8, 8, 1, None, False),
}
# Kernels for one machine are refused here and have tests of their own.
PORTABLE = [name for name in IMPLEMENTATIONS if not name.startswith('pallas')]
every = pytest.mark.parametrize('implementation', PORTABLE)


def make_case(name, seed=0, dtype=jnp.float32):
  """Rows of every telling length; garbage ids after counts of all sizes."""
  T, S, N, K, H, Hv, block_k, window, cut = CASES[name]
  lengths = [0, 1, block_k - 1, block_k, block_k + 1, S // 2 + 3, S]
  lengths = np.clip(lengths, 0, S)
  B = len(lengths)
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  args = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, Hv)
  blocks = -(-S // block_k)
  ids = np.stack([rng.permutation(blocks) for _ in range(B * K)])
  ids = ids.reshape(B, K, blocks)
  counts = rng.integers(0, blocks + 1, size=(B, K))
  counts[-1], counts[-2, 0] = blocks, 0
  past = np.arange(blocks) >= counts[..., None]
  ids = np.where(past, rng.choice([-5, 0, 10**6], size=ids.shape), ids)
  starts = rng.integers(0, np.maximum(lengths, 1)) if cut else None
  mask = oracles.decode_mask(
    ids, counts, lengths, T, S, block_k, window, starts
  )
  call = functools.partial(
    decode_attention,
    block_ids=jnp.asarray(ids, jnp.int32),
    block_counts=jnp.asarray(counts, jnp.int32),
    lengths=jnp.asarray(lengths, jnp.int32),
    block_k=block_k,
    window=window,
    starts=None if starts is None else jnp.asarray(starts, jnp.int32),
  )
  return args, call, mask


def check(got, args, mask, dtype='float32'):
  want, want_lse = oracles.attention(*args, mask)
  oracles.check_close(got[0].astype(jnp.float32), want, dtype, what='out')
  read = np.isfinite(want_lse)
  lse = np.asarray(got[1])
  np.testing.assert_array_equal(np.isfinite(lse), read)
  assert (lse[~read] == -np.inf).all()
  oracles.check_close(lse[read], want_lse[read], dtype, what='lse')
  assert (np.asarray(got[0], np.float32)[~read] == 0).all()


@every
@pytest.mark.parametrize(
  'name', tiers.cases(CASES, quick=['partial last block'])
)
def test_value(name, implementation):
  args, call, mask = make_case(name)
  call = functools.partial(call, implementation=implementation)
  got = jax.jit(call)(*args)
  check(got, args, mask)
  assert mask.any() and not mask.any(-1).all()


@every
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_low_precision_inputs_accumulate_in_f32(dtype, implementation):
  args, call, mask = make_case('partial last block', dtype=jnp.dtype(dtype))
  got = jax.jit(functools.partial(call, implementation=implementation))(*args)
  assert got[0].dtype == jnp.dtype(dtype) and got[1].dtype == jnp.float32
  check(got, args, mask, dtype)


def test_eager_equals_jit():
  args, call, mask = make_case('window and documents')
  check(call(*args), args, mask)


@pytest.mark.tier('default')
@pytest.mark.parametrize('keys, blocks', [(8, 8), (24, 8), (999, 3), (999, 99)])
def test_chunking_changes_nothing(keys, blocks, monkeypatch):
  """One block a step, a partial last chunk, and the whole list in one."""
  monkeypatch.setattr(xla_module, 'CHUNK_KEYS', keys)
  monkeypatch.setattr(xla_module, 'CHUNK_BLOCKS', blocks)
  args, call, mask = make_case('partial last block')
  check(call(*args, implementation='xla'), args, mask)


@every
def test_nothing_else_has_an_influence(implementation):
  """Keys that are not read, and ids past the count, change no bit."""
  (q, k, v), call, mask = make_case('documents', seed=3)
  call = functools.partial(call, implementation=implementation)
  run = jax.jit(lambda k, v, ids: call(q, k, v, block_ids=ids))
  ids = call.keywords['block_ids']
  want = run(k, v, ids)
  unread = jnp.asarray(~mask.any((1, 2)))[..., None, None]
  past = jnp.arange(ids.shape[-1])[None, None]
  past = past >= call.keywords['block_counts'][..., None]
  for junk in (0, -7, 10**6):
    got = run(
      jnp.where(unread, 9, k),
      jnp.where(unread, 1e6, v),
      jnp.where(past, junk, ids),
    )
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)


def test_lengths_and_counts_change_without_compiling_again():
  args, call, _ = make_case('three queries')
  ids = np.asarray(call.keywords['block_ids'])
  ids = np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
  B, K, blocks = ids.shape
  traces = []

  @jax.jit
  def run(counts, lengths):
    traces.append(1)
    return call(
      *args, block_ids=jnp.asarray(ids), block_counts=counts, lengths=lengths
    )

  for n in range(0, blocks + 1, 2):
    counts = np.full((B, K), n, np.int32)
    lengths = np.minimum(np.arange(B, dtype=np.int32) * n, 64)
    got = run(jnp.asarray(counts), jnp.asarray(lengths))
    check(got, args, oracles.decode_mask(ids, counts, lengths, 3, 64, 8))
  assert len(traces) == 1


@hypothesis.given(data=st.data())
def test_random_lists_and_lengths(data):
  args, _, _ = make_case('partial last block', seed=5)
  rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
  B, S, K = args[1].shape[:3]
  ids = np.stack([rng.permutation(8) for _ in range(B * K)]).reshape(B, K, 8)
  counts = rng.integers(0, data.draw(st.integers(0, 8)) + 1, size=(B, K))
  lengths = rng.integers(0, data.draw(st.integers(0, S)) + 1, size=B)
  starts = rng.integers(0, lengths + 1)
  lists = (jnp.asarray(x, jnp.int32) for x in (ids, counts, lengths, starts))
  got = _jitted(*args, *lists)
  check(
    got, args, oracles.decode_mask(ids, counts, lengths, 3, S, 8, None, starts)
  )


@jax.jit
def _jitted(q, k, v, ids, counts, lengths, starts):
  return decode_attention(
    q, k, v, ids, counts, lengths, block_k=8, starts=starts
  )


@pytest.mark.tier('default')
@every
def test_decode_is_prefill_row_by_row(implementation):
  """The same lists, token by token, over tile and block boundaries."""
  B, T, N, K, H, block_q, block_k, room = 2, 41, 4, 2, 16, 6, 8, 52
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
  k, v = jnp.asarray(rng.normal(size=(2, B, room, K, H)), jnp.float32)
  tiles, blocks = -(-T // block_q), -(-room // block_k)
  ids = [rng.permutation(blocks) for _ in range(B * K * tiles)]
  ids = jnp.asarray(np.stack(ids).reshape(B, K, tiles, blocks), jnp.int32)
  counts = jnp.asarray(
    rng.integers(1, blocks + 1, size=(B, K, tiles)), jnp.int32
  )
  sizes = dict(block_k=block_k, implementation=implementation)
  want = block_sparse_attention(q, k, v, ids, counts, block_q=block_q, **sizes)

  @jax.jit
  def step(t):
    tile = t // block_q
    lengths = jnp.full((B,), t + 1)
    row = jax.lax.dynamic_slice_in_dim(q, t, 1, 1)
    return decode_attention(
      row, k, v, ids[:, :, tile], counts[:, :, tile], lengths, **sizes
    )

  steps = [step(jnp.int32(t)) for t in range(T)]
  out = jnp.concatenate([out for out, _ in steps], 1)
  lse = np.concatenate([lse for _, lse in steps], 1)
  oracles.check_close(out, want[0])
  read = np.isfinite(want[1])
  np.testing.assert_array_equal(np.isfinite(lse), read)
  oracles.check_close(lse[read], np.asarray(want[1])[read])


def test_errors_name_the_shapes():
  (q, k, v), call, _ = make_case('one query')
  # Past the run-time shape check that only tests switch on.
  call = functools.partial(inspect.unwrap(call.func), **call.keywords)
  with pytest.raises(ValueError, match='differ in head width'):
    call(q[..., :8], k, v)
  with pytest.raises(ValueError, match='block_ids'):
    call(q, k, v, block_counts=call.keywords['block_counts'][:1])
  with pytest.raises(ValueError, match='lengths'):
    call(q, k, v, lengths=call.keywords['lengths'][:1])
  with pytest.raises(ValueError, match='unknown implementation'):
    call(q, k, v, implementation='cuda')
  with pytest.raises(ValueError, match='window=0'):
    call(q, k, v, window=0)
  with pytest.raises(ValueError, match='block_k=0'):
    call(q, k, v, block_k=0)
