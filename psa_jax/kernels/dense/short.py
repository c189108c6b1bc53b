"""Dense attention of short sequences in plain XLA: many whole heads at a time.

Where all scores of a head are one tile, the loop of `xla.py` over tiles is a
loop over heads, and what a step of it costs is the step: on a GPU some ten
launches, and a wait for the host where the tile decides how far an inner loop
goes. Here the heads of several rows of the batch are one batched product.

On a CPU heads with more scores than `LARGEST` are better off alone: their
backward pass is faster with its tiles keys first.
"""

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import platform, softmax
from psa_jax.kernels.tiles import Tiles

LARGEST = 2**16
# Scores that exist at a time, on a CPU what its caches hold; one row of the
# batch may have more.
SCORES, SCORES_ACCELERATOR = 2**19, 2**24


def fits(q, k) -> bool:
  """Whether heads of this size, each a single tile, are taken together."""
  tiles = _whole(q, k)
  return tiles.rows * tiles.S <= LARGEST or not _on_cpu()


def forward(spec, q, k, v, segments):
  """Output and log-sum-exp; see `api.dense_attention`."""
  acc = jnp.promote_types(q.dtype, jnp.float32)
  tiles = _whole(q, k)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)

  def row(q, k, v, segments):
    mask = _mask(spec, tiles, segments)

    def head(q, k, v):
      s = _scores(q, k, factor, acc, mask)
      run = softmax.start(tiles.rows, v.shape[-1], acc)
      return softmax.finish(softmax.add(run, s, v), v.dtype)

    return jax.vmap(head)(q, k, v)

  packed = qt, tiles.pack_k(k), tiles.pack_k(v)
  out, lse = _rows(tiles, row, packed, segments)
  return tiles.unpack_q(out), tiles.unpack_q(lse)


def backward(spec, saved, grads):
  """Gradients of q, k and v; arguments as in `xla._backward_rule`."""
  q, k, v, segments, out, lse = saved
  d_out, d_lse = grads
  acc = lse.dtype
  tiles = _whole(q, k)
  qt, factor = softmax.prescale(tiles.pack_q(q), spec.scale, acc)
  known = softmax.Backward.of(out, lse, d_out, d_lse)

  def row(q, k, v, d_out, lse, delta, segments):
    mask = _mask(spec, tiles, segments)

    def head(q, k, v, d_out, lse, delta):
      s = _scores(q, k, factor, acc, mask)
      p = jnp.exp(s - lse[:, None])
      dp = softmax.dot('rh,sh->rs', d_out, v, acc)
      ds = (p * (dp - delta[:, None])).astype(q.dtype)
      return (
        softmax.dot('rs,sh->rh', ds, k, acc) * spec.scale,
        softmax.dot('rs,rh->sh', ds, q, acc) * factor,
        softmax.dot('rs,rh->sh', p.astype(v.dtype), d_out, acc),
      )

    return jax.vmap(head)(q, k, v, d_out, lse, delta)

  of_rows = (tiles.pack_q(x) for x in (d_out, known.lse, known.delta))
  packed = qt, tiles.pack_k(k), tiles.pack_k(v), *of_rows
  dq, dk, dv = _rows(tiles, row, packed, segments)
  results = tiles.unpack_q(dq), tiles.unpack_k(dk), tiles.unpack_k(dv)
  return tuple(
    x.astype(like.dtype) for x, like in zip(results, (q, k, v), strict=True)
  )


def _on_cpu() -> bool:
  return platform.current().platform == 'cpu'


def _whole(q, k) -> Tiles:
  """One tile a head."""
  return Tiles.of(q, k, q.shape[1], k.shape[1])


def _scores(q, k, factor, acc, mask):
  """[rows, keys] of a head."""
  s = softmax.dot('rh,sh->rs', q, k, acc) * factor
  return s if mask is None else jnp.where(mask, s, softmax.MASKED)


def _mask(spec, tiles, segments):
  """[rows, keys] bool: which query of a row of the batch reads which key."""
  mask = None
  if spec.causal:
    t = tiles.q_positions(0, spec.q_offset)
    mask = jnp.arange(tiles.S)[None] <= t[:, None]
  if segments is None:
    return mask
  q_seg, kv_seg = segments
  same = jnp.tile(q_seg, tiles.G)[:, None] == kv_seg[None]
  return same if mask is None else mask & same


def _rows(tiles, row, packed, segments):
  """`row` of every row of the batch; arrays are [B * K, ...], also returned."""
  packed = [x.reshape(tiles.B, tiles.K, *x.shape[1:]) for x in packed]
  scores = SCORES if _on_cpu() else SCORES_ACCELERATOR
  size = max(1, scores // max(1, tiles.K * tiles.rows * tiles.S))
  if size >= tiles.B:
    outputs = jax.vmap(row)(*packed, segments)
  else:
    outputs = lax.map(lambda xs: row(*xs), (*packed, segments), batch_size=size)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
