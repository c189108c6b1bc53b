"""How far the indexer is from the attention that it stands for, streamed.

For every query t, over the keys s that it reads,

  KL(p[t] || softmax(I[t])) = sum_s p[t, s] (log p[t, s] - log softmax(I[t])[s])

where p[t] is the mean over heads of the softmax attention, which is the
L1-normalised sum of DSA (arXiv 2512.02556). Tiles of queries walk their block
lists with a dynamic trip count, so nothing of size T x S exists and the work
follows the counts: about that of one forward pass of the attention, and as
much again for the gradient, which is

  d KL / d I[t, s] = softmax(I[t])[s] - p[t, s].

Differentiable in the index only: the attention is the teacher, and a constant.
Heads that a mesh splits are summed by a collective a tile, for the logarithm of
a sum over heads is no sum.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from psa_jax.kernels import softmax, unread
from psa_jax.kernels.indexer.scores import Index

CHUNK_KEYS = 512  # keys read at a time


@dataclasses.dataclass(frozen=True)
class _Spec:
  """The static part of a call; `axis` is the mesh axis that splits heads."""

  block_q: int
  block_k: int
  axis: str | None


class _Data(NamedTuple):
  """Everything in tiles and blocks; `R` is a tile's queries times G.

  Attributes:
    q: [B * nq, K, R, H], scaled.
    lse: [B * nq, K, R]; inf where there is no query.
    k: [B * nk, block_k, K, H].
    ids: [B * nq, chunks, chunk]; counts: [B * nq].
    q_seg: [B * nq, block_q]; kv_seg: [B * nk, block_k].
  """

  q: jax.Array
  lse: jax.Array
  k: jax.Array
  ids: jax.Array
  counts: jax.Array
  q_seg: jax.Array
  kv_seg: jax.Array


def divergence(
  index: Index,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  lse: Float[Array, 'B T N'],
  block_ids: Int[Array, 'B Tb M'],
  block_counts: Int[Array, 'B Tb'],
  *,
  block_q: int,
  block_k: int,
  segment_ids: Int[Array, 'B T'] | None = None,
  axis: str | None = None,
) -> Float[Array, 'B T']:
  """KL of the attention to the indexer for each query, in f32 nats.

  Args:
    index: of every token; differentiable.
    q: queries of the attention,
    k: its keys, S = T,
    lse: and log-sum-exps of the scores it read, which must be those of the
      listed keys: then p sums to 1.
    block_ids: lists of key blocks that all heads share; see
      `kernels.block_sparse`.
    block_counts: entries to read of each.
    block_q: queries a list.
    block_k: keys a block.
    segment_ids: a query reads keys of its own segment only.
    axis: mesh axis that splits the heads N inside `shard_map`.
  """
  spec = _Spec(block_q, block_k, axis)
  data = _pack(
    spec,
    *lax.stop_gradient((q, k, lse, segment_ids)),
    block_ids,
    block_counts,
  )
  return _divergence(spec, q.shape[1], index, data)


def _pack(spec, q, k, lse, segment_ids, ids, counts) -> _Data:
  B, T, N, H = q.shape
  K = k.shape[2]
  nk = -(-T // spec.block_k)
  if segment_ids is None:
    segment_ids = jnp.zeros((B, T), jnp.int32)

  def heads(x, fill=0.0):  # [B, T, N, *] -> [B * nq, K, G * block_q, *]
    x = _cut(x.astype(jnp.float32), spec.block_q, fill)
    x = x.reshape(*x.shape[:2], K, N // K, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], K, -1, *x.shape[4:])

  chunk = max(1, min(CHUNK_KEYS // spec.block_k, ids.shape[-1]))
  ids = jnp.clip(ids.reshape(-1, ids.shape[-1]), 0, nk - 1)
  ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[-1] % chunk)))
  return _Data(
    q=heads(q) * H**-0.5,
    lse=heads(jnp.where(lse == -jnp.inf, jnp.inf, lse), jnp.inf),
    k=_cut(k.astype(jnp.float32), spec.block_k),
    ids=ids.reshape(len(ids), -1, chunk),
    counts=counts.reshape(-1),
    q_seg=_cut(segment_ids, spec.block_q),
    kv_seg=_cut(segment_ids, spec.block_k),
  )


def _cut(x, size, fill=0):
  """[B, T, *] -> [B * tiles, size, *], filled at the end."""
  rest = [(0, 0)] * (x.ndim - 2)
  pad = [(0, 0), (0, -x.shape[1] % size), *rest]
  x = jnp.pad(x, pad, constant_values=fill)
  return x.reshape(-1, size, *x.shape[2:])


def _cut_index(spec, index):
  """Tiles [B * nq, J, block_q, E] and [B * nq, J, block_q]; blocks of keys."""
  q, weights, k = (x.astype(jnp.float32) for x in index)
  q = jnp.moveaxis(_cut(q, spec.block_q), 1, 2)
  weights = jnp.moveaxis(_cut(weights, spec.block_q), 1, 2)
  return q, weights, _cut(k, spec.block_k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(spec, T, index, data):
  return _forward(spec, T, index, data)[0]


def _read(spec, T, index, data: _Data, tile, c):
  """What a tile reads in chunk `c` of its list.

  Returns:
    Where its blocks are, p and I [block_q, keys] (p is 0 and I is MASKED where
    a key is not read), the products behind I [J, block_q, keys], the
    indexer's keys [keys, E], and who reads which [block_q, keys].
  """
  iq, weights, ik = index
  nq, nk = -(-T // spec.block_q), -(-T // spec.block_k)
  ids = data.ids[tile, c]
  at = tile // nq * nk + ids
  keys = data.k[at].reshape(-1, *data.k.shape[2:])
  s = jnp.einsum('krh,skh->krs', data.q[tile], keys)
  p = jnp.exp(s - data.lse[tile][..., None])
  count = p.shape[0] * p.shape[1] // spec.block_q
  p = p.reshape(count, spec.block_q, -1).sum(0)
  if spec.axis is not None:
    p, count = lax.psum((p, count), spec.axis)
  ik = ik[at].reshape(-1, ik.shape[-1])
  raw = jnp.einsum('jqe,se->jqs', iq[tile], ik)
  i = jnp.einsum('jqs,jq->qs', jax.nn.relu(raw), weights[tile])
  pos = ids[:, None] * spec.block_k + jnp.arange(spec.block_k)[None]
  slot = c * len(ids) + jnp.arange(len(ids))
  used = (slot < data.counts[tile])[:, None] & (pos < T)
  t = tile % nq * spec.block_q + jnp.arange(spec.block_q)[:, None]
  mask = used.reshape(1, -1) & (pos.reshape(1, -1) <= t) & (t < T)
  segment = data.kv_seg[at].reshape(1, -1)
  mask = mask & (data.q_seg[tile][:, None] == segment)
  p = jnp.where(mask, p / count, 0)
  return at, p, jnp.where(mask, i, softmax.MASKED), raw, ik, mask


def _trips(data, tile):
  chunk = data.ids.shape[-1]
  return (data.counts[tile] + chunk - 1) // chunk


def _forward(spec, T, index, data):
  tiles = _cut_index(spec, index)
  B = index.q.shape[0]

  def one(tile):
    def step(c, run):
      top, total, mass, cross, entropy = run
      _, p, i, _, _, _ = _read(spec, T, tiles, data, tile, c)
      new = jnp.maximum(top, i.max(-1))
      total = total * jnp.exp(top - new) + jnp.exp(i - new[:, None]).sum(-1)
      entropy = entropy + jnp.where(p > 0, p * jnp.log(p), 0).sum(-1)
      return new, total, mass + p.sum(-1), cross + (p * i).sum(-1), entropy

    zero = jnp.zeros(spec.block_q)
    run = (zero + softmax.MASKED / 2, zero, zero, zero, zero)
    run = lax.fori_loop(0, _trips(data, tile), step, run)
    top, total, mass, cross, entropy = run
    read = total != 0  # NaN is something
    lse = jnp.where(read, top + jnp.log(jnp.where(read, total, 1)), jnp.inf)
    kl = entropy - cross + mass * jnp.where(read, lse, 0)
    return jnp.where(read, kl, 0), lse, mass

  kl, lse, mass = lax.map(one, jnp.arange(len(data.q)))
  return kl.reshape(B, -1)[:, :T], (lse, mass)


def _forward_rule(spec, T, index, data):
  kl, rows = _forward(spec, T, index, data)
  # Kept where a rematerialisation policy keeps the attention's own: then the
  # backward pass does not walk the lists a second time for them.
  rows = checkpoint_name(rows, 'attn_lse')
  return kl, (index, data, rows)


def _backward_rule(spec, T, saved, d_kl):
  index, data, (lse, mass) = saved
  tiles = _cut_index(spec, jax.tree.map(unread.clean, index))
  iq, weights, ik = tiles
  d_kl = _cut(d_kl, spec.block_q)

  def one(dk, tile):
    def step(c, carry):
      dq, dw, dk = carry
      at, p, i, raw, keys, mask = _read(spec, T, tiles, data, tile, c)
      share = mass[tile][:, None] * jnp.exp(i - lse[tile][:, None])
      # A row that is NaN has gradients only if something depends on it.
      di = d_kl[tile][:, None] * (share - p)
      di = jnp.where(mask & (d_kl[tile] != 0)[:, None], di, 0)
      dw = dw + jnp.einsum('qs,jqs->jq', di, jax.nn.relu(raw))
      slope = jnp.where(raw > 0, weights[tile][..., None], 0)
      slope = slope * di[None]
      dq = dq + jnp.einsum('jqs,se->jqe', slope, keys)
      new = jnp.einsum('jqs,jqe->se', slope, iq[tile])
      dk = dk.at[at].add(new.reshape(len(at), *dk.shape[1:]))
      return dq, dw, dk

    zero = jnp.zeros_like(iq[0]), jnp.zeros_like(weights[0]), dk
    dq, dw, dk = lax.fori_loop(0, _trips(data, tile), step, zero)
    return dk, (dq, dw)

  dk, (dq, dw) = lax.scan(one, jnp.zeros_like(ik), jnp.arange(len(iq)))
  B = index.q.shape[0]

  def join(x, like):  # [B * nq, J, block_q, *] -> [B, T, J, *]
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(B, -1, *like.shape[2:])[:, :T].astype(like.dtype)

  dk = dk.reshape(B, -1, dk.shape[-1])[:, :T].astype(index.k.dtype)
  d_index = Index(join(dq, index.q), join(dw, index.weights), dk)
  return d_index, None


_divergence.defvjp(_forward_rule, _backward_rule)
