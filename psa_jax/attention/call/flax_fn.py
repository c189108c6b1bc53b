"""What the attention modules of Flax call, their `attention_fn`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from psa_jax.attention.call import options
from psa_jax.attention.call.api import attention
from psa_jax.config import ConfigError, SoftmaxConfig
from psa_jax.types import Scalar


def attention_fn(
  kind: str = 'psa',
  *,
  is_causal: bool = False,
  step: Scalar | None = None,
  train: bool = True,
  implementation: str = 'auto',
  config: Any = None,
  softmax: str | SoftmaxConfig = 'exact',
  **settings: Any,
) -> Callable[..., jax.Array]:
  """A function for the `attention_fn` of Flax's attention, NNX and Linen.

      nnx.MultiHeadAttention(
        8, 512, attention_fn=psa_jax.attention_fn('psa', keep=0.25), rngs=rngs
      )(x, is_causal=True)

  A schedule that moves reads its step from `psa_jax.at_step`, for a layer does
  not hand one on. Dropout of attention weights, sown weights, a precision of
  one's own and replaced einsums are refused: the weights are never there as
  one array.

  Args:
    kind: as in `psa_jax.attention`; a layer that also decodes, or reads
      another sequence, takes `auto`.
    is_causal: what a layer that does not say so itself is taken to mean.
    step: of the schedules, where it never changes.
    train: see `psa_jax.attention`.
    implementation: see `psa_jax.attention`.
    config: see `psa_jax.attention`.
    softmax: see `psa_jax.attention`.
    **settings: see `psa_jax.attention`.

  Returns:
    A function with the arguments of `flax.nnx.dot_product_attention`.

  Raises:
    ConfigError: no such mechanism or setting.
  """
  options.resolve(  # what cannot be is refused here, not at the first call
    'psa' if kind == 'auto' else kind,
    config=config,
    softmax=softmax,
    implementation=implementation,
    options=settings,
  )
  always_causal = is_causal

  # Linen hands on only what stands in this signature by name.
  def attend(
    query,
    key,
    value,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    promote_dtype=None,
    is_causal=False,
    force_fp32_for_softmax=False,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
  ):
    del broadcast_dropout, dropout_rng
    del force_fp32_for_softmax  # it always is
    if dropout_rate and not deterministic:
      raise ConfigError(
        f'dropout_rate={dropout_rate}: psa_jax.attention_fn drops no attention '
        'weights; set dropout_rate=0 or deterministic=True'
      )
    refused = {
      'precision': precision,
      'module (sow_weights=True)': module,
      'promote_dtype': promote_dtype,
      'qk_attn_weights_einsum': qk_attn_weights_einsum,
      'attn_weights_value_einsum': attn_weights_value_einsum,
    }
    for name, value_of in refused.items():
      if value_of is not None:
        raise ConfigError(f'psa_jax.attention_fn takes no {name}; leave it out')
    dtype = dtype or jnp.result_type(query, key, value)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    arrays = [_one_batch(x, 3) for x in (query, key, value)]
    out = attention(
      *arrays,
      _one_batch(bias, 3),
      None if mask is None else _one_batch(jnp.asarray(mask, bool), 3),
      kind=kind,
      is_causal=always_causal or is_causal,
      step=step,
      train=train,
      implementation=implementation,
      config=config,
      softmax=softmax,
      **settings,
    )
    return out.reshape(*batch, *out.shape[-3:])

  return attend


def _one_batch(x, axes: int):
  """`x` with all but its last `axes` axes in one, if it has more than one."""
  if x is None or x.ndim <= axes + 1:
    return x
  return x.reshape(math.prod(x.shape[:-axes]), *x.shape[-axes:])
