"""Block scores and their ranking in plain XLA, streamed over queries.

A chunk of queries meets the compressed keys a block at a time: probabilities
from the log-sum-exp, added over the heads of the group, kept for the chunk
only. They are then added over cells (equation 9) and ranked. All of it is done
on logarithms: in f32 a probability below e^-104 is 0, and what is 0 ties.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from psa_jax.kernels import softmax
from psa_jax.kernels.compressed.ranking import newest, rank
from psa_jax.kernels.compressed.xla import KEYS, ROWS

# Logarithms of a chunk of queries; their sums take a few arrays as large.
ENTRIES = 2**21


def top_blocks(q, k, lse, positions, starts, ranges, *, blocks, spec):
  """See `api.top_blocks`."""
  B, T, N, H = q.shape
  C, K = k.shape[1:3]
  G = N // K
  chunk = min(max(1, ROWS // G), max(1, ENTRIES // C), T)
  q, factor = softmax.prescale(q, spec.scale, lse.dtype)
  keys = min(KEYS, C)
  k = jnp.pad(k, ((0, 0), (0, -C % keys), (0, 0), (0, 0)))
  k = jnp.moveaxis(k.reshape(B, -1, keys, K, H), 3, 1)

  def split(x):  # [B, T, *] -> [B, chunks, chunk, *]
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, -T % chunk), *rest], mode='edge')
    return x.reshape(B, -1, chunk, *x.shape[2:])

  q = split(q.reshape(B, T, K, G, H))
  lse = split(lse.reshape(B, T, K, G))
  chunks = q.shape[1]
  if starts is None:
    starts = jnp.zeros_like(positions)
  tokens = jax.tree.map(split, (positions, starts, ranges))

  def one(i):  # of [B, K, chunks]
    b, head, c = i // (K * chunks), i // chunks % K, i % chunks
    at, start, near = jax.tree.map(lambda x: x[b, c], tokens)
    log_p = _log_probabilities(
      q[b, c, :, head], k[b, head], lse[b, c, :, head], at, start, factor, spec
    )
    near = jax.tree.map(lambda x: x[None], near)
    scores = block_scores(log_p, blocks, spec)[None, None]
    return rank(scores, near, spec.width)[0, 0]

  ids = lax.map(one, jnp.arange(B * K * chunks))
  return ids.reshape(B, K, -1, spec.width)[:, :, :T]


def _log_probabilities(q, k, lse, positions, starts, factor, spec):
  """[n, C]: log of the sum over the G heads of the softmax to compressed keys.

  Args:
    q: [n, G, H] queries of one kv head.
    k: [tiles, keys, H].
    lse: [n, G].
    positions: [n], the last one the largest.
    starts: [n].
    factor: on the scores.
    spec: sizes.
  """
  n, G, H = q.shape
  keys = k.shape[1]
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # sees nothing: gives -inf
  rows, lse = q.reshape(n * G, H), lse.reshape(n * G, 1)
  last = newest(positions, spec.block, spec.stride)[:, None]

  def step(j, found):
    s = softmax.dot('rh,sh->rs', rows, k[j], lse.dtype) * factor
    log_p = jax.nn.logsumexp((s - lse).reshape(n, G, keys), axis=1)
    m = j * keys + jnp.arange(keys)[None]
    mask = (m <= last) & (m * spec.stride >= starts[:, None])
    log_p = jnp.where(mask, log_p, -jnp.inf)
    return lax.dynamic_update_slice(found, log_p, (0, j * keys))

  stop = jnp.clip(last[-1, 0] // keys + 1, 0, k.shape[0])
  found = jnp.full((n, k.shape[0] * keys), -jnp.inf, lse.dtype)
  return lax.fori_loop(0, stop, step, found)


def block_scores(log_p, blocks, spec):
  """Equation 9 on logarithms: [n, C] probabilities to [n, blocks] scores."""
  cells = spec.select_block // spec.stride
  reach = spec.block // spec.stride
  room = blocks * cells
  behind = max(0, room - log_p.shape[1])
  pad = ((0, 0), (reach - 1, behind))
  log_p = jnp.pad(log_p, pad, constant_values=-jnp.inf)
  # A compressed block lies over the cells m .. m + reach - 1.
  shared = [log_p[:, reach - 1 - n :][:, :room] for n in range(reach)]
  shared = functools.reduce(jnp.logaddexp, shared)
  return jax.nn.logsumexp(shared.reshape(-1, blocks, cells), axis=-1)
