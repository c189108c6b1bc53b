"""Block-list attention with its derivative, for the walks in plain XLA.

A walk (`xla.py`, `xla_keys.py`) is two functions over packed tiles: one makes
the output and the log-sum-exp, the other the gradients from these. What is
saved between them, and in which layout and scale they come and go, is here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from psa_jax.kernels import softmax, unread
from psa_jax.kernels.tiles import Tiles


class Packed(NamedTuple):
  """What a walk reads, in tiles (`tiles.py`).

  Attributes:
    tiles: sizes of the call.
    q: queries [tiles, rows, H]; they carry the scale if `factor` is 1.
    factor: that scores still need.
    k, v: keys and values [blocks, block_k, *].
    acc: dtype of sums.
  """

  tiles: Tiles
  q: jax.Array
  factor: float
  k: jax.Array
  v: jax.Array
  acc: Any

  @classmethod
  def of(cls, spec, q, k, v):
    """The arrays of a call."""
    acc = jnp.promote_types(q.dtype, jnp.float32)
    tiles = Tiles.of(q, k, spec.block_q, spec.block_k)
    qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
    return cls(tiles, qt, factor, tiles.pack_k(k), tiles.pack_k(v), acc)


def differentiable(
  forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
  """`(q, k, v, ids, counts, segments, cubic, *, spec)` -> output, log-sum-exp.

  Args:
    forward: from spec, `Packed`, ids, counts, segments and cubic to output,
      log-sum-exp and, where the softmax needs it (else None), row maximum, for
      [tiles, rows].
    backward: from the same with the gradient of the output and
      `softmax.Backward`, both for [tiles, rows], before ids, to the gradients
      of queries [tiles, rows, H], scaled and in their dtype, of keys and values
      as they are packed, in `acc`, and of the cubic.
  """

  def run(spec, q, k, v, *lists):
    packed = Packed.of(spec, q, k, v)
    results = forward(spec, packed, *lists)
    return jax.tree.map(packed.tiles.unpack_q, results)

  def save(spec, q, k, v, *lists):
    out, lse, top = run(spec, q, k, v, *lists)
    # Named so that a rematerialisation policy can keep them: then the backward
    # pass recomputes the projections but not the attention.
    out = checkpoint_name(out, 'attn_out')
    lse = checkpoint_name(lse, 'attn_lse')
    if top is not None:
      top = checkpoint_name(top, 'attn_lse')
    return (out, lse), (q, k, v, lists, out, lse, top)

  def pull(spec, saved, grads):
    q, k, v, lists, out, lse, top = saved
    d_out, d_lse = grads
    packed = Packed.of(spec, unread.clean(q), unread.clean(k), v)
    tiles, cubic = packed.tiles, lists[-1]
    rows = softmax.Backward.of(out, lse, d_out, d_lse, top)
    rows = jax.tree.map(tiles.pack_q, rows)
    dq, dk, dv, d_cubic = backward(
      spec, packed, tiles.pack_q(d_out), rows, *lists
    )
    # The queries in dk carry the scale where `factor` is 1 (`prescale`); the
    # keys in dq never do.
    dk = tiles.unpack_k((dk * packed.factor).astype(k.dtype))
    dv = tiles.unpack_k(dv.astype(v.dtype))
    d_cubic = jax.tree.map(lambda x, of: x.astype(of.dtype), d_cubic, cubic)
    return tiles.unpack_q(dq), dk, dv, None, None, None, d_cubic

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attention(spec, *args):
    return run(spec, *args)[:2]

  attention.defvjp(save, pull)
  return lambda *args, spec: attention(spec, *args)
