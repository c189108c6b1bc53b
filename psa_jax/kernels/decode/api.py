"""Attention of one new query, or a few, over a cache by block list.

Decoding reads every cached key once a step, so its cost is bytes: what is not
listed is not read. Each sequence of the batch has its own length; the cache
has room for more.

Not done here: choosing the blocks (see `psa_jax/attention`), writing new keys
into the cache, and a backward pass, which decoding has no use for: `xla` and
the accelerators' kernels refuse to be differentiated.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from psa_jax.kernels import arguments, platform
from psa_jax.kernels.decode import pallas_gpu, pallas_tpu, reference, xla
from psa_jax.kernels.platform import Implementation

IMPLEMENTATIONS = {
  'pallas_tpu': Implementation(
    pallas_tpu.decode_attention, pallas_tpu.refusal, platform='tpu'
  ),
  'pallas_gpu': Implementation(
    pallas_gpu.decode_attention, pallas_gpu.refusal, platform='gpu'
  ),
  'xla': Implementation(xla.decode_attention),
  'reference': Implementation(reference.decode_attention, automatic=False),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call."""

  block_k: int
  window: int | None
  scale: float
  heads_first: bool = False


def decode_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  block_ids: Int[Array, 'B K M'],
  block_counts: Int[Array, 'B K'],
  lengths: Int[Array, 'B'],
  *,
  block_k: int,
  window: int | None = None,
  starts: Int[Array, 'B'] | None = None,
  scale: float | None = None,
  heads_first: bool = False,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Softmax attention of the last `T` tokens over the listed cached blocks.

  Args:
    q: queries of the newest tokens; query `t` of row `b` is at position
      `lengths[b] - T + t`.
    k: cached keys, those of the new tokens included; S is the cache's room.
    v: cached values; `Hv` may differ from `H`.
    block_ids: indices of key blocks in [0, ceil(S / block_k)), without
      duplicates among the first `block_counts`, shared by the T queries and
      the G heads of a group. Entries past the count may hold anything.
    block_counts: how many entries of `block_ids` to read; traced.
    lengths: tokens in the cache; what lies behind is not read. 0 is an idle
      row.
    block_k: keys a block; the last block may be partial.
    window: on top of the list, a query reads only the `window` keys up to and
      including its own position.
    starts: position of the first token of each row's document; earlier keys
      are not read. None means 0.
    scale: factor on the scores; None means H ** -0.5.
    heads_first: the cache is stored as [B, K, S, *], and `k` and `v` are views
      of it. Changes no result, but what has to be copied (`pallas_tpu`).
    implementation: a key of `IMPLEMENTATIONS`, or `auto` for the platform's
      best.

  Returns:
    The output in the dtype of `v` and the log-sum-exp of the scores that were
    read (f32, or f64 for f64 inputs). A query that reads nothing, or that lies
    before position 0, gives 0 and -inf.

  Raises:
    ValueError: shapes that do not fit, naming both; an implementation that
      cannot run here, saying why.
  """
  arguments.check_attention(q, k, v, None, None)
  _check(q, k, block_ids, block_counts, lengths, block_k, window)
  scale = arguments.scale_or_default(q, scale)
  spec = Spec(block_k, window, scale, heads_first)
  if starts is None:
    starts = jnp.zeros_like(lengths)
  ids, counts, lengths, starts = (
    x.astype(jnp.int32) for x in (block_ids, block_counts, lengths, starts)
  )
  args = q, k, v, ids, counts, lengths, starts
  run = platform.pick(implementation, IMPLEMENTATIONS, *args, spec=spec)
  return run(*args, spec=spec)


def _check(q, k, ids, counts, lengths, block_k, window):
  if block_k < 1:
    raise ValueError(f'block_k={block_k} must be >= 1')
  if window is not None and window < 1:
    raise ValueError(f'window={window} must be >= 1')
  want = (q.shape[0], k.shape[2])
  if ids.shape[:2] != want or counts.shape != want:
    raise ValueError(
      f'block_ids {ids.shape} and block_counts {counts.shape} must start with '
      f'[B, K] = {want}'
    )
  if lengths.shape != want[:1]:
    raise ValueError(f'lengths {lengths.shape} must be [B] = {want[:1]}')
