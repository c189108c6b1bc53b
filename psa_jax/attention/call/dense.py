"""`kind='dense'`, and when `kind='auto'` takes it."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from psa_jax.attention.call.arrays import Arrays
from psa_jax.config import ConfigError
from psa_jax.kernels import platform, unread
from psa_jax.kernels.dense import dense_attention

log = logging.getLogger('psa_jax')

# Length from which forward and backward of `psa` together were faster than the
# fastest dense attention: experiments/speed_64k and experiments/speed_gpu, with
# lists of 24 blocks. Of TPUs there is no measurement; they take the larger one.
CROSSOVER = {'cpu': 4096, 'gpu': 8192}

_SAID: set[str] = set()


def choose(arrays: Arrays, *, is_causal: bool, named: tuple[str, ...]) -> str:
  """The mechanism that `kind='auto'` means: `psa`, or `dense` and why.

  Args:
    arrays: of the call.
    is_causal: of the call.
    named: arguments of the call that `psa` does not take, or may not obey.
  """
  T, S = arrays.query.shape[1], arrays.key.shape[1]
  where = platform.current().platform
  crossover = CROSSOVER.get(where, max(CROSSOVER.values()))
  if named:
    reason = f'{" and ".join(named)} is given'
  elif T != S:
    reason = f'the query has length {T} and the key {S}'
  elif not is_causal:
    reason = 'is_causal is False'
  elif T < crossover:
    measured = 'on' if where in CROSSOVER else 'on others than'
    reason = f'length {T} is below the {crossover} measured {measured} {where}'
  else:
    return 'psa'
  line = f"psa_jax.attention(kind='auto') takes dense: {reason}"
  if line not in _SAID:
    _SAID.add(line)
    log.warning(line)
  return 'dense'


def attend(
  arrays: Arrays,
  *,
  is_causal: bool,
  scale: float | None,
  segment_ids: jax.Array | None,
  implementation: str,
  return_residual: bool,
  **masks: Any,
) -> tuple[jax.Array, jax.Array | None]:
  """Dense attention: our kernel, or JAX's where masks are given.

  Ours takes memory linear in the length; JAX's XLA path does not.

  Args:
    arrays: of the call.
    is_causal: as in JAX.
    scale: as in JAX.
    segment_ids: [B, T] documents, or None.
    implementation: as in `AttentionConfig`.
    return_residual: as in JAX.
    **masks: the arguments of `jax.nn.dot_product_attention` that mask or
      weigh; None where they are not given.

  Returns:
    Output [B, T, N, Hv], and the log-sum-exp [B, T, N] if it was asked for.

  Raises:
    ConfigError: an implementation that takes no masks.
  """
  q, k, v, _ = arrays
  named = [name for name, value in masks.items() if value is not None]
  if not named:
    out, lse = dense_attention(
      q,
      k,
      v,
      causal=is_causal,
      q_segment_ids=segment_ids,
      kv_segment_ids=segment_ids,
      scale=scale,
      implementation=implementation,
    )
    return out, lse if return_residual else None
  implementations = {
    'auto': None,
    'reference': 'xla',
    'xla': 'xla',
    'cudnn': 'cudnn',
  }
  if implementation not in implementations:
    raise ConfigError(
      f'implementation={implementation!r} takes no {" and no ".join(named)}; '
      "use 'auto'"
    )
  if segment_ids is not None:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    mask = masks['mask']
    masks['mask'] = same if mask is None else same & mask
  attention: Any = jax.nn.dot_product_attention  # its type wants literals
  of_jax = functools.partial(
    attention,
    is_causal=is_causal,
    scale=scale,
    implementation=implementations[implementation],
    return_residual=True,
  )
  bad = ~(unread.finite(k) & unread.finite(v))
  seen = _read_by(of_jax, q, bad, v, masks) | ~unread.finite(q)
  out, lse = of_jax(*(unread.clean(x) for x in (q, k, v)), **masks)
  lse = jnp.where(seen, jnp.nan, lse) if return_residual else None
  return unread.spoil(out, seen), lse


def _read_by(of_jax, q, bad, v, masks) -> jax.Array:
  """[B, T, N] bool: which query reads one of the keys `bad` [B, S, K].

  With equal weights, that none is so small that it rounds to 0.
  """
  bias = masks['bias']
  if bias is not None:
    bias = jnp.where(bias == -jnp.inf, bias, 0)
  B, T, N, H = q.shape

  def probe():
    k = jnp.zeros((*bad.shape, H), q.dtype)
    found = jnp.broadcast_to(bad[..., None], v.shape).astype(v.dtype)
    out, lse = of_jax(jnp.zeros_like(q), k, found, **masks | dict(bias=bias))
    # JAX takes the mean of all where a query reads nothing.
    return (out > 0).any(-1) & (lse > -1e4)

  return jax.lax.cond(bad.any(), probe, lambda: jnp.zeros((B, T, N), jnp.bool_))


def nothing(arrays: Arrays) -> jax.Array:
  """The output where there are no rows or no queries."""
  return jnp.zeros(arrays.shape, arrays.value.dtype)
