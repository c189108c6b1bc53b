"""Attention to compressed keys against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psa_jax.config import ConfigError
from psa_jax.kernels import compressed, platform
from psa_jax.kernels.compressed import api, stacked, xla
from tests import oracles, tiers
from tests.attention import nsa_oracle
from tests.attention.nsa_oracle import Sizes


def arrays(sizes, T, K=2, G=2, H=8, Hv=6, B=2):
  C = compressed.count(T, block=sizes.l, stride=sizes.d)
  rng = np.random.default_rng(T)
  shapes = (B, T, K * G, H), (B, C, K, H), (B, C, K, Hv)
  return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def run(name, sizes, q, k, v, starts):
  if name == 'stacked':  # by name it is refused on a CPU
    spec = api.Spec(sizes.l, sizes.d, q.shape[-1] ** -0.5)
    return stacked.compressed_attention(q, k, v, starts, spec=spec)
  return compressed.compressed_attention(
    q, k, v, block=sizes.l, stride=sizes.d, starts=starts, implementation=name
  )


@pytest.mark.parametrize(
  'name', tiers.cases(['xla', 'stacked', 'reference'], quick=['xla'])
)
@pytest.mark.parametrize(
  ('l', 'd', 'T', 'G', 'cut'),
  [(6, 2, 41, 2, True), (4, 4, 30, 1, True), (6, 3, 40, 3, False)],
)
def test_value_and_gradients(name, l, d, T, G, cut, monkeypatch):
  monkeypatch.setattr(xla, 'ROWS', 16)  # many tiles of few queries
  monkeypatch.setattr(xla, 'KEYS', 5)
  sizes = Sizes(l=l, d=d, select=12, n=3, w=1)
  q, k, v = (jnp.asarray(x) for x in arrays(sizes, T, G=G))
  segments, starts = None, None
  if cut:
    bounds = np.asarray([[9, 16], [20, 21]])
    segments = [np.searchsorted(b, np.arange(T), 'right') for b in bounds]
    segments = np.stack(segments).tolist()
    at = [
      [nsa_oracle.document_start(segments, b, t) for t in range(T)]
      for b in range(2)
    ]
    starts = jnp.asarray(at)
  mask = nsa_oracle.compress_mask(2, 2, T, sizes, segments)
  want_out, want_lse = oracles.attention(q, k, v, mask)
  rng = np.random.default_rng(0)
  d_out = rng.normal(size=want_out.shape).astype(np.float32)
  seen = np.isfinite(want_lse)
  d_lse = (rng.normal(size=want_lse.shape) * seen).astype(np.float32)

  def loss(q, k, v):
    out, lse = run(name, sizes, q, k, v, starts)
    total = (out * d_out).sum() + jnp.where(seen, lse * d_lse, 0).sum()
    return total, (out, lse)

  grads, (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  oracles.check_close(out, want_out)
  np.testing.assert_array_equal(np.isfinite(lse), seen)
  oracles.check_close(np.where(seen, lse, 0), np.where(seen, want_lse, 0))
  want = oracles.attention_grads(q, k, v, mask, d_out, d_lse)
  for got, grad in zip(grads, want, strict=True):
    oracles.check_close(got, grad, gradient=True)


def test_accelerators_take_their_dense_kernel_and_cpus_do_not():
  q, k, v = (jnp.asarray(x) for x in arrays(Sizes(4, 2, 8, 3, 1), 30))
  spec = api.Spec(4, 2, 1.0)

  def taken():
    args = q, k, v, None
    return platform.pick('auto', api.IMPLEMENTATIONS, *args, spec=spec)

  assert taken() is api.IMPLEMENTATIONS['xla'].run
  with platform.target('tpu', kind='v5e'):
    assert taken() is stacked.compressed_attention
  with platform.target('gpu', capability=90):  # cuDNN does no f32
    assert taken() is api.IMPLEMENTATIONS['xla'].run
  with pytest.raises(ConfigError, match='no dense kernel of its own on cpu'):
    platform.pick('stacked', api.IMPLEMENTATIONS, q, k, v, None, spec=spec)


def test_nothing_is_complete():
  sizes = Sizes(l=8, d=4, select=8, n=3, w=1)
  q, k, v = (jnp.asarray(x) for x in arrays(sizes, 7))
  assert k.shape[1] == 0
  out, lse = run('auto', sizes, q, k, v, None)
  assert (np.asarray(out) == 0).all() and (np.asarray(lse) == -np.inf).all()


def test_what_does_not_fit_is_named():
  sizes = Sizes(l=8, d=4, select=8, n=3, w=1)
  q, k, v = (jnp.asarray(x) for x in arrays(sizes, 20))
  with pytest.raises(ValueError, match=r'20 queries have 4 complete blocks'):
    run('auto', sizes, q, k[:, :3], v[:, :3], None)
  with pytest.raises(
    ValueError, match='block=8 must be a multiple of stride=3'
  ):
    compressed.compressed_attention(q, k, v, block=8, stride=3)
