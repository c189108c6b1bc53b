"""The TPU kernels of block lists: simulated against float64, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import platform
from psa_jax.kernels.block_sparse import (
  block_sparse_attention,
  pallas_tpu_backward,
  pallas_tpu_walk,
)
from psa_jax.kernels.block_sparse.api import Spec
from tests import oracles
from tests.kernels.test_block_sparse import CASES, make_case

pytestmark = pytest.mark.tier('default')


def step_of(call, d_out, d_lse):
  """Jitted gradients, output and log-sum-exp."""
  call = functools.partial(call, implementation='pallas_tpu')

  def loss(*args):
    out, lse = call(*args)
    some = jnp.isfinite(lse)
    lse_part = jnp.where(some, jnp.where(some, lse, 0) * d_lse, 0).sum()
    return (out.astype(jnp.float32) * d_out).sum() + lse_part, (out, lse)

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def check(args, call, mask, d_out, dtype='float32'):
  """Value, log-sum-exp and all gradients against the oracle."""
  d_lse = np.random.default_rng(1).normal(size=d_out.shape[:-1])
  grads, (out, lse) = step_of(call, d_out, d_lse)(*args)
  assert out.dtype == args[2].dtype and lse.dtype == jnp.float32
  args = [np.asarray(x, np.float64) for x in args]
  want, want_lse = oracles.attention(*args, mask)
  oracles.check_close(out.astype(jnp.float32), want, dtype, what='out')
  some = np.isfinite(want_lse)
  assert (np.asarray(lse)[~some] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[some], want_lse[some], dtype, what='lse')
  want_grads = oracles.attention_grads(
    *args, mask, d_out, np.where(some, d_lse, 0)
  )
  for got, grad, what in zip(grads, want_grads, 'qkv', strict=True):
    got = got.astype(jnp.float32)
    oracles.check_close(got, grad, dtype, gradient=True, what=f'd{what}')


@pytest.mark.parametrize('name', list(CASES))
def test_value_and_gradients(name):
  with platform.target('tpu', interpret=True):
    check(*make_case(name))


def test_bfloat16():
  with platform.target('tpu', interpret=True):
    check(*make_case('narrow values', dtype=jnp.bfloat16), 'bfloat16')


def test_many_chunks_and_pieces(monkeypatch):
  """Several chunks of keys and query tiles, and pieces of rows, in each."""
  monkeypatch.setattr(pallas_tpu_walk, 'CHUNK_KEYS', 128)
  monkeypatch.setattr(pallas_tpu_walk, 'PIECE_ROWS', 64)
  monkeypatch.setattr(pallas_tpu_backward, 'CHUNK_ROWS', 128)
  monkeypatch.setitem(
    CASES, 'many', (1, 200, 600, 8, 2, 16, 16, 32, 64, True, 400, True)
  )
  with platform.target('tpu', interpret=True):
    check(*make_case('many'))


def test_window_cuts_single_keys():
  args, call, mask, d_out = make_case('odd lengths')
  t = np.arange(77)
  near = (t[None] > t[:, None] - 13)[None, None]
  with platform.target('tpu', interpret=True):
    check(args, functools.partial(call, window=13), mask & near, d_out)


# In units of blocks the tiles begin at thirds; the last block is partial.
UNMASKED = {
  'causal': ((1, 192, 300, 2, 1, 16, 16, 48, 128, False, 108, True), None),
  'window': ((1, 192, 300, 2, 1, 16, 16, 48, 128, False, 108, True), 190),
  'last block': ((1, 96, 300, 2, 1, 16, 16, 48, 128, False, 0, False), None),
}


@pytest.mark.parametrize('name', list(UNMASKED))
def test_chunks_without_a_mask(name, monkeypatch):
  """One block a chunk, so that some are read whole and some are cut."""
  monkeypatch.setattr(pallas_tpu_walk, 'CHUNK_KEYS', 128)
  monkeypatch.setattr(pallas_tpu_backward, 'CHUNK_ROWS', 96)
  case, window = UNMASKED[name]
  monkeypatch.setitem(CASES, 'unmasked', case)
  args, call, mask, d_out = make_case('unmasked', dtype=jnp.bfloat16)
  every = jnp.full_like(call.keywords['block_counts'], 3)
  call = functools.partial(call, block_counts=every, window=window)
  T, S, offset, causal = case[1], case[2], *case[-2:]
  t, s = np.arange(T)[:, None] + offset, np.arange(S)[None]
  mask = np.broadcast_to((s <= t) | (not causal), mask.shape)
  if window:
    mask = mask & (s > t - window)
  with platform.target('tpu', interpret=True):
    check(args, call, mask, d_out, 'bfloat16')


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', [None, 1, 30, 150])
@pytest.mark.parametrize('block_q', [1, 12, 16])
def test_only_chunks_read_whole_have_no_mask(
  block_q, window, causal, monkeypatch
):
  monkeypatch.setattr(pallas_tpu_walk, 'CHUNK_KEYS', 128)
  T, S, block_k = 70, 300, 16
  spec = Spec(block_q, block_k, causal, window, S - T, 1.0)
  q, k = jnp.zeros((1, T, 2, 8)), jnp.zeros((1, S, 1, 8))
  tiles, blocks = -(-T // block_q), -(-S // block_k)
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(blocks) for _ in range(tiles)])[None, None]
  ids[..., :8] = np.sort(ids, -1)[..., :8]  # far in the past
  counts = rng.integers(8, blocks + 1, size=(1, 1, tiles))
  call = pallas_tpu_walk.Call.of(spec, q, k, k, ids, None, False)
  cuts = np.asarray(call.cuts(jnp.asarray(ids), jnp.asarray(counts)))[0, 0]
  t = np.arange(tiles * block_q)[:, None] + S - T
  s = np.arange(blocks * block_k)[None]
  reads = (s < S) & ((s <= t) | (not causal)) & (s > t - (window or 10**6))
  reads = reads.reshape(tiles, block_q, blocks, block_k).all((1, 3))
  for i, c in np.ndindex(cuts.shape):
    part = ids[0, 0, i, c * call.chunk : (c + 1) * call.chunk]
    full = (c + 1) * call.chunk <= counts[0, 0, i]
    assert cuts[i, c] == (not (full and reads[i, part].all()))
  for i, j in np.ndindex(reads.shape):
    assert bool(call.cut_keys(j, i, i)) == (not reads[i, j])
  assert cuts.any() and (window is not None or not cuts.all())


@pytest.mark.tier('ci')
@pytest.mark.parametrize('name', ['narrow values', 'shorter than a block'])
def test_no_races(name):
  """Reads of memory that nothing wrote give NaN here; too long ones raise."""
  simulator = pltpu.InterpretParams(detect_races=True)
  with platform.target('tpu', interpret=simulator):
    check(*make_case(name))
  assert not interpret_pallas_call.races.races_found


def test_readers_run_over_the_ring(monkeypatch):
  """The stream of readers is longer than what is kept of it."""
  monkeypatch.setattr(pallas_tpu_backward, 'CHUNK_ROWS', 128)
  case = (1, 200, 72, 1, 1, 8, 8, 1, 1, False, 0, False)
  monkeypatch.setitem(CASES, 'long', case)
  args, call, mask, d_out = make_case('long')
  rows = call.keywords['block_counts'].sum() / 128
  assert rows > pallas_tpu_backward.RING
  with platform.target('tpu', interpret=True):
    check(args, call, mask, d_out)


def test_counts_and_entries_past_them():
  """Garbage after the count changes no bit; counts of 0 read nothing."""
  args, call, _, d_out = make_case('odd lengths')
  ids, counts = call.keywords['block_ids'], call.keywords['block_counts']
  past = jnp.arange(ids.shape[-1])[None, None, None] >= counts[..., None]

  @jax.jit
  def run(ids, counts):
    with_lists = functools.partial(call, block_ids=ids, block_counts=counts)
    d_lse = np.ones(d_out.shape[:-1])
    return step_of(with_lists, d_out, d_lse)(*args)

  with platform.target('tpu', interpret=True):
    want = run(ids, counts)
    for garbage in (0, -7, 10**6):
      got = run(jnp.where(past, garbage, ids), counts)
      assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, want))
    grads, (out, lse) = run(ids, 0 * counts)
  assert all((x == 0).all() for x in (out, *grads))
  assert (lse == -jnp.inf).all()


# B, T, S, N, K, H, Hv, block_q, block_k, M, dtype, segments
LOWERED = [
  (1, 65536, 65536, 16, 4, 128, 128, 128, 64, 32, 'bfloat16', False),
  (1, 65536, 65536, 16, 4, 64, 64, 128, 64, 32, 'float32', True),
  (2, 1000, 1000, 2, 2, 72, 72, 16, 16, 7, 'bfloat16', True),
  (1, 512, 512, 16, 1, 192, 128, 1, 64, 8, 'bfloat16', False),
  (1, 300, 777, 16, 1, 128, 128, 128, 128, 6, 'bfloat16', False),
  (1, 300, 300, 3, 1, 128, 128, 1, 8, 6, 'float32', True),
]


@pytest.mark.parametrize('case', LOWERED, ids=str)
def test_lowers_for_tpu(case):
  B, T, S, N, K, H, Hv, block_q, block_k, M, dtype, cut = case
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv)
  args = [jax.ShapeDtypeStruct(x, dtype) for x in shapes]
  tiles = -(-T // block_q)
  lists = [(B, K, tiles, M), (B, K, tiles)] + cut * [(B, T), (B, S)]
  args += [jax.ShapeDtypeStruct(x, jnp.int32) for x in lists]

  def forward(q, k, v, ids, counts, *segments):
    names = 'q_segment_ids', 'kv_segment_ids'
    return block_sparse_attention(
      q,
      k,
      v,
      ids,
      counts,
      block_q=block_q,
      block_k=block_k,
      q_offset=S - T,
      **dict(zip(names, segments, strict=False)),
    )

  def backward(q, k, v, *rest):
    out, vjp = jax.vjp(lambda *args: forward(*args, *rest), q, k, v)
    return vjp(jax.tree.map(jnp.ones_like, out))

  with platform.target('tpu', kind='v5e'):
    for run, kernels in (forward, 1), (backward, 3):
      lowered = jax.jit(run).trace(*args).lower(lowering_platforms=('tpu',))
      assert lowered.as_text().count('tpu_custom_call') == kernels


def test_refusals_say_why():
  args, call, _, _ = make_case('plain')
  call = functools.partial(call, implementation='pallas_tpu')
  with pytest.raises(ValueError, match='needs a TPU, not cpu'):
    call(*args)
  with platform.target('tpu', kind='TPU v2'):
    with pytest.raises(ValueError, match='TPU v2'):
      call(*args)
  half = [x.astype(jnp.float16) for x in args]
  with platform.target('tpu'), pytest.raises(ValueError, match='float16'):
    call(*half)
  with platform.target('tpu'), pytest.raises(ValueError, match='VMEM'):
    wide = jnp.zeros((1, 512, 16, 128))
    narrow = wide[:, :, :1]
    block_sparse_attention(
      wide,
      narrow,
      narrow,
      jnp.zeros((1, 1, 2, 1), jnp.int32),
      jnp.zeros((1, 1, 2), jnp.int32),
      block_q=256,
      block_k=64,
      implementation='pallas_tpu',
    )
