"""`psa_jax.attention`: the call of `jax.nn.dot_product_attention`, sparse."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from psa_jax.attention.call import dense, kinds, options, rows, steps
from psa_jax.attention.call.arrays import Arrays, prepare
from psa_jax.config import AttentionConfig, ConfigError, SoftmaxConfig
from psa_jax.types import AttnOut, Learned, Scalar


def attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  bias: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  *,
  kind: str = 'psa',
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: ArrayLike | None = None,
  key_value_seq_lengths: ArrayLike | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  implementation: str | None = 'auto',
  return_residual: bool = False,
  segment_ids: ArrayLike | None = None,
  step: Scalar | None = None,
  train: bool = True,
  learned: Learned | None = None,
  config: Any = None,
  softmax: str | SoftmaxConfig = 'exact',
  return_aux: bool = False,
  **settings: Any,
):
  """Attention that reads only what its mechanism keeps.

  Arguments up to `return_residual` are those of
  `jax.nn.dot_product_attention`, in the same letters, for JAX and NumPy arrays.
  `kind='dense'` obeys all of them. The others pick keys and cannot obey
  everything: they take causality, documents (`segment_ids`), and masks and
  lengths that say no more than that. Padding gives 0 there, and a mask that
  says more is refused, or under `jit`, where nothing is known of its values,
  gives NaN. `bias`, `local_window_size` and `return_residual` are refused.

      out = psa_jax.attention(q, k, v, is_causal=True, keep=0.25)

  Args:
    query: [B, T, N, H] or [T, N, H].
    key: [B, S, K, H] or [S, K, H]; N is a multiple of K.
    value: [B, S, K, Hv] or [S, K, Hv].
    bias: added to the scores.
    mask: bool [B, N, T, S], true where a query reads a key.
    kind: the mechanism; or `auto`, which is `psa` from the length on at which
      it was measured to be faster, else `dense`, and says so once.
    scale: on the scores; None means H ** -0.5.
    is_causal: a query reads keys up to its own position. Mechanisms that
      cannot do otherwise want it said.
    query_seq_lengths: [B] int32, queries that count.
    key_value_seq_lengths: [B] int32, keys that count.
    local_window_size: keys to the left and right that are read.
    implementation: how kernels run; None or `auto` is the platform's best.
    return_residual: return the log-sum-exp [B, T, N] too.
    segment_ids: [B, T] int, nondecreasing: no attention between documents.
    step: optimiser step of the schedules; None means that of
      `psa_jax.at_step`.
    train: False uses a mechanism's budget for evaluation, if it has one.
    learned: what the mechanism's own parameters made of the layer's input;
      `psa_jax.nnx.SparseAttention` has them.
    config: the mechanism's settings, or an `AttentionConfig`.
    softmax: `exact`, `sas`, or a `SoftmaxConfig`, for mechanisms that read
      block lists.
    return_aux: return an `AttnOut`: the output, and the mechanism's scalars
      (`density` is the share of visible keys that was read).
    **settings: fields of the mechanism's settings. A schedule is made by
      `psa_jax.schedules`; a number is a constant one.

  Returns:
    [B, T, N, Hv] or [T, N, Hv] in the dtype of `value`.

  Raises:
    ValueError: arguments that do not fit or that the mechanism does not take,
      by name, with the shape and the way out (ConfigError is one).
  """
  arrays = prepare(query, key, value)
  masks = _masks(arrays, bias, mask, query_seq_lengths, key_value_seq_lengths)
  masks['local_window_size'] = local_window_size
  documents = _documents(arrays, segment_ids)
  name = kind
  resolved = options.resolve(
    'psa' if kind == 'auto' else kind,
    config=config,
    softmax=softmax,
    implementation=implementation,
    options=settings,
  )
  if kind == 'auto':
    named = [key for key, value in masks.items() if value is not None]
    named += ['return_residual'] if return_residual else []
    name = dense.choose(arrays, is_causal=is_causal, named=tuple(named))
  if not all(arrays.shape[:3]):
    out, aux = dense.nothing(arrays), {'density': jnp.float32(1)}
    residual = jnp.zeros(out.shape[:3], jnp.float32)
  elif name == 'dense':
    out, residual = dense.attend(
      arrays,
      is_causal=is_causal,
      scale=scale,
      segment_ids=documents,
      implementation=resolved.implementation,
      return_residual=return_residual,
      **masks,
    )
    aux = {'density': jnp.float32(1)}
  else:
    _refuse(name, arrays, masks, return_residual)
    at = steps.current(resolved, kinds.find(name).section, step)
    out, aux = _sparse(
      arrays,
      resolved,
      masks,
      is_causal=is_causal,
      scale=scale,
      documents=documents,
      step=at,
      train=train,
      learned=learned,
    )
    residual = None
  if not arrays.batched:
    out = out[0]
    residual = None if residual is None else residual[0]
  if return_aux:
    return AttnOut(out, aux)
  return (out, residual) if return_residual else out


def _masks(arrays: Arrays, bias, mask, queries, keys) -> dict[str, Any]:
  """The masking arguments by JAX's names, with a batch axis."""
  masks: dict[str, Any] = {'bias': bias, 'mask': mask}
  for name, array in masks.items():
    if array is None:
      continue
    array = jnp.asarray(array)
    array = array[(None,) * max(0, 4 - array.ndim)]
    shape = (*arrays.shape[:1], arrays.shape[2], arrays.shape[1])
    shape = (*shape, arrays.key.shape[1])
    fits = array.ndim == 4 and all(
      size in (1, want) for size, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
      raise ValueError(
        f'{name} {array.shape} does not broadcast to [B, N, T, S] = {shape}'
      )
    masks[name] = array
  if mask is not None and masks['mask'].dtype != jnp.bool_:
    raise ValueError(
      f'mask is {masks["mask"].dtype.name}; give a bool one, true where a '
      'query reads a key, or what is added to the scores as bias'
    )
  lengths = {'query_seq_lengths': queries, 'key_value_seq_lengths': keys}
  for name, array in lengths.items():
    if array is None:
      masks[name] = None
      continue
    array = jnp.asarray(array, jnp.int32)
    if array.shape != arrays.shape[:1]:
      raise ValueError(f'{name} {array.shape} must be [B] = {arrays.shape[:1]}')
    masks[name] = array
  return masks


def _documents(arrays: Arrays, segment_ids) -> jax.Array | None:
  if segment_ids is None:
    return None
  segment_ids = jnp.asarray(segment_ids)
  if not arrays.batched:
    segment_ids = segment_ids[None]
  shape = arrays.shape[:2]
  if not arrays.same_length:
    raise ValueError(
      f'segment_ids say which documents one sequence has, but query has length '
      f'{shape[1]} and key {arrays.key.shape[1]}; give a mask'
    )
  if segment_ids.shape != shape:
    raise ValueError(f'segment_ids {segment_ids.shape} must be [B, T] {shape}')
  return segment_ids.astype(jnp.int32)


def _refuse(name: str, arrays: Arrays, masks, return_residual: bool) -> None:
  """Names the arguments that no sparse mechanism takes."""
  if not arrays.same_length:
    raise ConfigError(
      f'query {arrays.query.shape} and key {arrays.key.shape} differ in '
      f'length, but kind={name!r} reads one sequence; cross-attention takes '
      "kind='dense' (or 'auto', which is dense there)"
    )
  arguments = {
    'bias': masks['bias'] is not None,
    'local_window_size': masks['local_window_size'] is not None,
    'return_residual': return_residual,
  }
  for argument, present in arguments.items():
    if present:
      raise ConfigError(
        f"kind={name!r} takes no {argument}=; leave it out, or use kind='dense'"
      )


def _sparse(
  arrays: Arrays,
  config: AttentionConfig,
  masks: dict[str, Any],
  *,
  is_causal: bool,
  scale: float | None,
  documents: jax.Array | None,
  step: Scalar,
  train: bool,
  learned: Learned | None,
) -> AttnOut:
  kind, mask = kinds.find(config.name), masks['mask']
  causal = is_causal or kind.causal_only
  # A mask with a row for every query may be causal itself.
  causality = is_causal or (mask is not None and mask.shape[2] > 1)
  if kind.causal_only and not causality:
    raise ConfigError(
      f'kind={kind.name!r} is causal; pass is_causal=True, or for a '
      f'bidirectional model one of {", ".join(kinds.bidirectional())}'
    )
  if kind.needs_learned and learned is None:
    raise ConfigError(
      f'kind={kind.name!r} has parameters of its own; use '
      f'psa_jax.nnx.SparseAttention(kind={kind.name!r}), which has them, or '
      'pass learned='
    )
  lengths = masks['query_seq_lengths'], masks['key_value_seq_lengths']
  counted = rows.Rows(documents)
  sources = documents is not None, mask is not None, lengths != (None, None)
  if sum(sources) > 1:
    raise ConfigError(
      f'kind={kind.name!r} takes documents from one of segment_ids, mask and '
      'sequence lengths; give one of them'
    )
  B, T = arrays.shape[:2]
  if mask is not None:
    counted = rows.of_mask(
      mask, kind.name, B, T, causal=causal, is_causal=is_causal
    )
  elif sources[2]:
    counted = rows.of_lengths(*lengths, kind.name, T, causal=causal)
  q = arrays.query
  if scale is not None:
    q = q * jnp.asarray(scale * q.shape[3] ** 0.5, q.dtype)
  out, aux = kinds.run(
    q,
    arrays.key,
    arrays.value,
    config=config,
    step=step,
    segment_ids=counted.segment_ids,
    train=train,
    causal=causal,
    learned=learned,
  )
  return AttnOut(counted.apply(out), aux)
