"""Attention to compressed keys by a dense kernel of the platform.

Query t sees the compressed keys up to `(t - l + 1) // d`, so d queries in a
row see the same ones. Laid side by side, as d times as many heads, they are
one query of an ordinary causal attention: C queries against C keys. The first
l - 1 queries see nothing and are left out. Nothing is read twice and nothing
more is computed, and what JAX ships for TPUs and GPUs can do it.

Documents: a compressed key's is that of its last token if the whole block
lies in it, else none. Of the d queries the first one stands for all: one that
begins a document behind it sees no complete block yet.

Not done here: the choice of blocks, which stays in XLA. On CPUs the tiles of
dense attention are too tall for so many heads: `xla` is faster there.
"""

import jax
import jax.numpy as jnp

from psa_jax.kernels.dense import api as dense

NATIVE = {'tpu': 'pallas_tpu', 'gpu': 'cudnn'}
NOBODY = -1  # document of a block that straddles two


def refusal(where, q, k, v, starts, *, spec) -> str | None:
  """Why no dense kernel of `where` takes the stacked arguments, or None."""
  if where.platform not in NATIVE:
    return f'there is no dense kernel of its own on {where.platform}'
  native = dense.IMPLEMENTATIONS[NATIVE[where.platform]]
  args = jax.eval_shape(lambda *x: _stack(*x, spec), q, k, v, starts)
  return native.refusal(where, *args, spec=_dense(spec))


def compressed_attention(q, k, v, starts, *, spec):
  """See `api.compressed_attention`."""
  stack, k, v, segments = _stack(q, k, v, starts, spec)
  segments = (None, None) if segments is None else segments
  out, lse = dense.dense_attention(
    stack,
    k,
    v,
    q_segment_ids=segments[0],
    kv_segment_ids=segments[1],
    scale=spec.scale,
  )
  out, lse = (_unstack(x, q, k.shape[2], spec) for x in (out, lse))
  if starts is None:
    return out, lse
  first = jnp.repeat(_at_ends(starts, k.shape[1], spec), spec.stride, axis=1)
  T, skipped = q.shape[1], spec.block - 1
  first = jnp.pad(first, ((0, 0), (skipped, 0)))[:, :T]
  in_document = (first == starts)[..., None]
  return jnp.where(in_document[..., None], out, 0), jnp.where(
    in_document, lse, -jnp.inf
  )


def _dense(spec):
  return dense.Spec(causal=True, q_offset=0, scale=spec.scale)


def _at_ends(starts, blocks, spec):
  """[B, C] document of each block's last token."""
  return starts[:, spec.block - 1 :: spec.stride][:, :blocks]


def _stack(q, k, v, starts, spec):
  """Arguments of dense attention: [B, C, K * d * G, H], k, v, segments."""
  B, _, N, H = q.shape
  C, K = k.shape[1:3]
  d = spec.stride
  q = q[:, spec.block - 1 :]
  q = jnp.pad(q, ((0, 0), (0, C * d - q.shape[1]), (0, 0), (0, 0)))
  q = q.reshape(B, C, d, K, N // K, H)
  q = jnp.moveaxis(q, 2, 3).reshape(B, C, -1, H)
  if starts is None:
    return q, k, v, None
  ends = _at_ends(starts, C, spec)
  whole = ends <= jnp.arange(C)[None] * d
  return q, k, v, (ends, jnp.where(whole, ends, NOBODY))


def _unstack(x, q, K, spec):
  """[B, C, K * d * G, *] -> [B, T, N, *]; 0 and -inf for who sees nothing."""
  B, T, N, _ = q.shape
  C, rest = x.shape[1], x.shape[3:]
  x = x.reshape(B, C, K, spec.stride, N // K, *rest)
  x = jnp.moveaxis(x, 3, 2).reshape(B, -1, N, *rest)[:, : T - spec.block + 1]
  pad = ((0, 0), (spec.block - 1, 0), *(((0, 0),) * (x.ndim - 2)))
  return jnp.pad(x, pad, constant_values=0 if rest else -jnp.inf)
