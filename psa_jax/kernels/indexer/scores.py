"""The indexer's scores of key blocks, streamed over queries.

DeepSeek-V3.2-Exp (arXiv 2512.02556), equation 1: a few small heads share one
key a token,

  I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s])

and a block's score pools those of its keys. XLA only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from psa_jax.kernels import unread

# Numbers in the largest array that exists at a time, [B, queries, J, S].
ROOM = 1 << 21


class Index(NamedTuple):
  """What the indexer makes of every token; `J` are its heads, `E` their width.

  Attributes:
    q: queries,
    weights: and what each head counts; a scale is part of them.
    k: keys.
  """

  q: Float[Array, 'B T J E']
  weights: Float[Array, 'B T J']
  k: Float[Array, 'B S E']


def token_scores(
  q: Float[Array, 'B n J E'],
  weights: Float[Array, 'B n J'],
  k: Float[Array, 'B S E'],
) -> Float[Array, 'B n S']:
  """I[t, s] in f32, whole; only for a few queries at a time."""
  raw = jnp.einsum('bnje,bse->bnjs', *(x.astype(jnp.float32) for x in (q, k)))
  weights = weights.astype(jnp.float32)
  return jnp.einsum('bnjs,bnj->bns', jax.nn.relu(raw), weights)


def block_importance(
  index: Index,
  starts: Int[Array, 'B n'],
  *,
  block_k: int,
  pooling: str,
  then,
):
  """Scores of all key blocks for each query, handed to `then` in pieces.

  Args:
    index: n queries, and all keys.
    starts: the first key that each query may see; earlier ones of a block do
      not count. Who may see which block is the caller's matter.
    block_k: keys a block; the last one may be partial.
    pooling: `max` or `sum` of the scores of a block's keys; `mass` is the
      logarithm of the sum of their exponentials, the share that a softmax of
      the scores would give the block.
    then: called with `(scores, pieces)`: scores [B, m, blocks] of m queries
      and the numbers [m] of those queries; returns arrays [B, m, ...].

  Returns:
    What `then` returned, joined to [B, n, ...].
  """
  # A NaN would come before what is always read.
  index = jax.tree.map(lambda x: unread.clean(lax.stop_gradient(x)), index)
  B, n, J, _ = index.q.shape
  S = index.k.shape[1]
  group = max(1, min(n, ROOM // (B * J * S)))

  def split(x):  # [B, n, *] -> [chunks, B, group, *]
    x = jnp.pad(x, [(0, 0), (0, -n % group)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, group, *x.shape[2:]), 1, 0)

  def one(chunk):
    q, weights, starts, number = chunk
    scores = token_scores(q, weights, index.k)
    scores = _pool(scores, starts, block_k, pooling)
    return then(scores, number)

  # `then` indexes by these numbers; padded queries repeat the last one.
  number = jnp.minimum(jnp.arange(n + -n % group), n - 1).reshape(-1, group)
  pieces = (split(index.q), split(index.weights), split(starts), number)
  lists = lax.map(one, pieces)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :n]

  return jax.tree.map(join, lists)


def _pool(scores, starts, block_k, pooling):
  """[B, m, S] to [B, m, blocks], over keys from `starts` [B, m] on."""
  B, m, S = scores.shape
  pad = -S % block_k
  at = jnp.arange(S + pad)[None, None]
  mask = (at >= starts[..., None]) & (at < S)
  scores = jnp.pad(scores, ((0, 0), (0, 0), (0, pad)))
  # What changes neither a sum nor a maximum.
  empty = 0 if pooling == 'sum' else -jnp.inf
  scores = jnp.where(mask, scores, empty).reshape(B, m, -1, block_k)
  if pooling == 'sum':
    return scores.sum(-1)
  if pooling == 'max':
    return scores.max(-1)
  return jax.nn.logsumexp(scores, axis=-1)
