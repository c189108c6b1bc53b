"""The TPU kernel of decoding: simulated against float64, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from psa_jax.kernels import platform
from psa_jax.kernels.decode import decode_attention, pallas_tpu
from psa_jax.kernels.decode.api import Spec
from psa_jax.kernels.mosaic import Shape
from psa_jax.kernels.tiles import Tiles
from tests import oracles

pytestmark = pytest.mark.tier('default')

# name: B, T, S, N, K, H, Hv, block_k, M, window, whether starts are given
CASES = {
  'one token': (3, 1, 64, 4, 2, 16, 16, 8, 8, None, False),
  'a few tokens': (2, 3, 70, 4, 2, 16, 24, 8, 5, None, True),
  'window': (2, 2, 50, 3, 1, 72, 16, 16, 4, 11, True),
  'G = 16': (2, 1, 300, 16, 1, 64, 64, 128, 3, None, False),
  'several chunks': (1, 1, 1400, 1, 1, 8, 8, 32, 44, None, False),
  'in place': (1, 2, 90, 4, 4, 128, 128, 16, 6, None, True),
  'in place, one head': (2, 1, 41, 2, 1, 128, 256, 8, 6, 20, False),
}


def make_case(name, dtype=jnp.float32):
  B, T, S, N, K, H, Hv, block_k, M, window, cut = CASES[name]
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  args = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, Hv)
  blocks = -(-S // block_k)
  ids = np.stack([rng.permutation(blocks)[:M] for _ in range(B * K)])
  ids = ids.reshape(B, K, M)
  counts = rng.integers(1, M + 1, size=(B, K))
  lengths = rng.integers(S // 2, S + 1, size=B)
  lengths[-1] = S if B == 1 else 1  # shorter than T in some cases
  if B > 2:
    lengths[1] = 0
    counts[2, 0] = 0
  starts = rng.integers(0, 9, size=B) if cut else np.zeros(B, int)
  mask = np.zeros((B, K, T, S), bool)
  for b, h, t in np.ndindex(B, K, T):
    at = lengths[b] - T + t
    for j in ids[b, h][: counts[b, h]]:
      for s in range(j * block_k, min((j + 1) * block_k, S)):
        near = window is None or s > at - window
        mask[b, h, t, s] = starts[b] <= s <= at and near
  call = functools.partial(
    decode_attention,
    block_ids=jnp.asarray(ids),
    block_counts=jnp.asarray(counts),
    lengths=jnp.asarray(lengths),
    starts=jnp.asarray(starts) if cut else None,
    block_k=block_k,
    window=window,
    implementation='pallas_tpu',
  )
  return args, call, mask


def check(args, call, mask, dtype='float32'):
  """A jitted call against the oracle."""
  out, lse = jax.jit(call)(*args)
  assert out.dtype == args[2].dtype and lse.dtype == jnp.float32
  args = [np.asarray(x, np.float64) for x in args]
  want, want_lse = oracles.attention(*args, mask)
  oracles.check_close(out.astype(jnp.float32), want, dtype, what='out')
  some = np.isfinite(want_lse)
  assert some.any()
  assert (np.asarray(lse)[~some] == -np.inf).all()
  oracles.check_close(np.asarray(lse)[some], want_lse[some], dtype, what='lse')


@pytest.mark.parametrize('name', list(CASES))
def test_value(name):
  with platform.target('tpu', interpret=True):
    check(*make_case(name))


def test_bfloat16():
  with platform.target('tpu', interpret=True):
    check(*make_case('a few tokens', jnp.bfloat16), 'bfloat16')


def stored(name, dtype, **settings):
  (q, k, v), call, _ = make_case(name, dtype)
  spec = Spec(call.keywords['block_k'], None, 1.0, **settings)
  tiles = Tiles.of(q, k, q.shape[1], spec.block_k)
  return pallas_tpu.Stored.of(spec, Shape.of(tiles, q, v), dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cache_by_token_is_read_in_place(dtype):
  """The last block is partial, and read from where it fits."""
  name = 'in place'
  assert stored(name, jnp.dtype(dtype)) == (True, dtype == 'bfloat16')
  assert stored(name, jnp.dtype(dtype), heads_first=True) == (False, False)
  args, call, mask = make_case(name, jnp.dtype(dtype))
  ids, counts = (
    np.asarray(call.keywords[name]) for name in ('block_ids', 'block_counts')
  )
  listed = np.arange(ids.shape[-1]) < counts[..., None]
  assert (listed & (ids == 5)).any() and args[1].shape[1] % 16
  with platform.target('tpu', interpret=True):
    check(args, call, mask, dtype)
    check(args, functools.partial(call, heads_first=True), mask, dtype)


def test_an_odd_head_is_copied():
  assert stored('in place, one head', jnp.dtype('bfloat16')) == (False, False)
  assert stored('one token', jnp.dtype('float32')) == (False, False)


@pytest.mark.tier('ci')
@pytest.mark.parametrize('name', ['one token', 'several chunks', 'in place'])
def test_no_races(name):
  """Reads of memory that nothing wrote give NaN here; too long ones raise."""
  simulator = pltpu.InterpretParams(detect_races=True)
  with platform.target('tpu', interpret=simulator):
    check(*make_case(name))
  assert not interpret_pallas_call.races.races_found


def test_counts_of_zero_read_nothing():
  args, call, _ = make_case('a few tokens')
  counts = jnp.zeros_like(call.keywords['block_counts'])
  with platform.target('tpu', interpret=True):
    out, lse = jax.jit(functools.partial(call, block_counts=counts))(*args)
  assert (out == 0).all() and (lse == -jnp.inf).all()


def test_entries_past_the_count_are_not_read():
  args, call, _ = make_case('a few tokens')
  ids, counts = call.keywords['block_ids'], call.keywords['block_counts']
  past = jnp.arange(ids.shape[-1])[None, None] >= counts[..., None]
  assert past.any()
  with platform.target('tpu', interpret=True):
    run = jax.jit(lambda ids: call(*args, block_ids=ids))
    want = run(ids)
    for garbage in (0, -7, 10**6):
      got = run(jnp.where(past, garbage, ids))
      assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, want))


# B, T, S, N, K, H, Hv, block_k, M, dtype
LOWERED = [
  (1, 1, 65536, 16, 4, 128, 128, 64, 32, 'bfloat16'),
  (8, 1, 65536, 32, 2, 64, 64, 64, 32, 'bfloat16'),
  (2, 4, 1000, 4, 4, 72, 72, 16, 9, 'float32'),
  (2, 1, 4096, 16, 16, 192, 128, 128, 8, 'bfloat16'),
]


@pytest.mark.parametrize('case', LOWERED, ids=str)
def test_lowers_for_tpu(case):
  B, T, S, N, K, H, Hv, block_k, M, dtype = case
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv)
  args = [jax.ShapeDtypeStruct(x, dtype) for x in shapes]
  lists = (B, K, M), (B, K), (B,)
  args += [jax.ShapeDtypeStruct(x, jnp.int32) for x in lists]
  run = jax.jit(functools.partial(decode_attention, block_k=block_k))
  # Views of bf16 as 32-bit numbers ask JAX, not us, which chip it is for.
  chip = AbstractDevice('TPU v5 lite', 1, 'tpu')
  mesh = jax.sharding.AbstractMesh((1,), ('chip',), abstract_device=chip)
  with (
    platform.target('tpu', kind='v5e'),
    jax.sharding.use_abstract_mesh(mesh),
  ):
    text = run.trace(*args).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 1


def test_refusals_say_why():
  args, call, _ = make_case('one token')
  with pytest.raises(ValueError, match='needs a TPU, not cpu'):
    call(*args)
  with platform.target('tpu', kind='TPU v3'):
    with pytest.raises(ValueError, match='TPU v3'):
      call(*args)
  half = [x.astype(jnp.float16) for x in args]
  with platform.target('tpu'), pytest.raises(ValueError, match='float16'):
    call(*half)
  with platform.target('tpu'), pytest.raises(ValueError, match='VMEM'):
    wide = jnp.zeros((1, 512, 16, 128))
    decode_attention(
      wide,
      wide[:, :, :1],
      wide[:, :, :1],
      jnp.zeros((1, 1, 8), jnp.int32),
      jnp.zeros((1, 1), jnp.int32),
      jnp.zeros((1,), jnp.int32),
      block_k=64,
      implementation='pallas_tpu',
    )
