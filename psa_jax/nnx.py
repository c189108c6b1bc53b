"""Flax NNX modules for models that are not ours."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from psa_jax.attention.call import options, steps
from psa_jax.attention.call.kinds import bidirectional, find
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.layer import SelfAttention
from psa_jax.attention.rotary import rotary
from psa_jax.config import ConfigError, ModelConfig, NormConfig
from psa_jax.norm import Norm
from psa_jax.types import Scalar


class SparseAttention(nnx.Module):
  """Self-attention with projections and the mechanism's own parameters.

      layer = psa_jax.nnx.SparseAttention(
        8, 512, kind='dsa', top_k=1024, rngs=nnx.Rngs(0)
      )
      y = layer(x, step=step)

  Attributes:
    layer: `wq` [D, N, H], `wk` and `wv` [D, K, H], `wo` [N, H, D], biases, and
      the parameters of the mechanism under `mechanism`.
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    *,
    kind: str = 'psa',
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    is_causal: bool = True,
    rotary_base: float | None = 10_000.0,
    use_bias: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    implementation: str = 'auto',
    config: Any = None,
    softmax: Any = 'exact',
    rngs: nnx.Rngs,
    **settings: Any,
  ):
    """Creates the parameters.

    Args:
      num_heads: N.
      in_features: D, of inputs and outputs.
      kind: the mechanism.
      num_kv_heads: K; None means N.
      head_dim: H, even; None means D // N.
      is_causal: whether a query reads only keys up to its own position.
      rotary_base: of the rotary positions of queries and keys; None gives them
        none (the model has positions of another kind).
      use_bias: whether projections add one.
      dtype: of the products; None means that of the input.
      param_dtype: of the parameters.
      implementation: as in `psa_jax.attention`.
      config: as in `psa_jax.attention`.
      softmax: as in `psa_jax.attention`.
      rngs: of the initial values.
      **settings: as in `psa_jax.attention`.

    Raises:
      ConfigError: sizes that do not fit, or what the mechanism cannot do.
    """
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
      raise ConfigError(
        f'num_heads={num_heads} must be a multiple of '
        f'num_kv_heads={num_kv_heads}'
      )
    if head_dim is None and in_features % num_heads:
      raise ConfigError(
        f'in_features={in_features} must be a multiple of '
        f'num_heads={num_heads}; or pass head_dim='
      )
    self.head_dim = head_dim or in_features // num_heads
    attention = options.resolve(
      kind,
      config=config,
      softmax=softmax,
      implementation=implementation,
      options=settings,
    )
    mechanism = find(kind)
    if mechanism.causal_only and not is_causal:
      raise ConfigError(
        f'kind={kind!r} is causal, but is_causal is False; take one of '
        f'{", ".join(bidirectional())}'
      )
    if mechanism.needs_rotary and rotary_base is None:
      raise ConfigError(
        f'kind={kind!r} turns keys of its own; pass rotary_base=10_000'
      )
    self.section, self.is_causal = mechanism.section, is_causal
    self.rotary_base, self.dtype = rotary_base, dtype
    self.layer = SelfAttention(
      ModelConfig(
        d_model=in_features,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=self.head_dim,
        biases=use_bias,
        attention=attention,
        param_dtype=jnp.dtype(param_dtype).name,
      ),
      rngs=rngs,
    )

  def __call__(
    self,
    x: ArrayLike,
    *,
    step: Scalar | None = None,
    segment_ids: ArrayLike | None = None,
    train: bool = True,
    return_aux: bool = False,
  ) -> Any:
    """Attends from every position of every document to what it may read.

    Args:
      x: [B, T, D].
      step: optimiser step of the schedules; None means that of
        `psa_jax.at_step`.
      segment_ids: [B, T] int, nondecreasing; documents of packed rows.
      train: False uses a mechanism's budget for evaluation, if it has one.
      return_aux: return the mechanism's f32 scalars too. Those named
        `loss/...` belong to the training loss: without them `dsa`'s indexer
        learns nothing.

    Returns:
      [B, T, D], or with `return_aux` a pair of it and the scalars.
    """
    x = jnp.asarray(x, self.dtype)
    width = self.layer.config.d_model
    if x.ndim != 3 or x.shape[2] != width:
      raise ValueError(f'x {x.shape} must be [batch, length, {width}]')
    if segment_ids is not None:
      segment_ids = jnp.asarray(segment_ids, jnp.int32)
      if segment_ids.shape != x.shape[:2]:
        raise ValueError(f'segment_ids {segment_ids.shape} must be [B, T]')
    config = self.layer.config.attention
    step = steps.current(config, self.section, step)
    if not x.size:
      return (x, {}) if return_aux else x
    out, aux = self.layer(
      x,
      context=AttentionContext(
        step=step,
        rope=self._rope(x, segment_ids),
        segment_ids=segment_ids,
        train=train,
        causal=self.is_causal,
      ),
    )
    return (out, aux) if return_aux else out

  def _rope(self, x, segment_ids):
    if self.rotary_base is None:
      return None
    positions = jnp.arange(x.shape[1])[None]
    if segment_ids is not None:
      new = segment_ids[:, 1:] != segment_ids[:, :-1]
      start = jnp.where(jnp.pad(new, ((0, 0), (1, 0))), positions, 0)
      positions = positions - jax.lax.cummax(start, axis=1)
    return rotary(positions, head_dim=self.head_dim, theta=self.rotary_base)


class PRepBN(Norm):
  """PRepBN (SLAB, arXiv 2405.11582): from a norm per token to one that folds.

      norm = psa_jax.nnx.PRepBN(512, decay_steps=10_000, rngs=rngs)
      y = norm(x, step=step, train=True)

  Running statistics are `nnx.BatchStat` variables: a compiled step has to
  return them.
  """

  def __init__(
    self,
    num_features: int,
    *,
    decay_steps: int,
    warmup_steps: int = 0,
    base: str = 'layernorm',
    momentum: float = 0.9,
    base_epsilon: float = 1e-6,
    bn_epsilon: float = 1e-5,
    statistics: str = 'batch',
    scale_init: float = 1.0,
    eta_init: float = 1.0,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
  ):
    """Creates parameters and statistics.

    Args:
      num_features: D, the size of the last axis.
      decay_steps: optimiser steps over which the base norm fades.
      warmup_steps: steps of pure base norm first.
      base: `layernorm` or `rmsnorm`.
      momentum: weight of the old running statistics.
      base_epsilon: added to the variance by the base norm.
      bn_epsilon: added to the variance by the batch norm.
      statistics: `batch`, or `running`, which leaks nothing of the future of a
        causal model.
      scale_init: initial batch-norm scale.
      eta_init: initial weight of the identity.
      param_dtype: of the parameters; statistics are f32.
      rngs: not read, every initial value is a constant.

    Raises:
      ConfigError: impossible values.
    """
    config = NormConfig(
      kind='prepbn',
      base=base,
      decay_steps=decay_steps,
      warmup_steps=warmup_steps,
      momentum=momentum,
      base_eps=base_epsilon,
      bn_eps=bn_epsilon,
      statistics=statistics,
      scale_init=scale_init,
      eta_init=eta_init,
    )
    super().__init__(num_features, config, param_dtype=param_dtype, rngs=rngs)
    self.num_features = num_features

  def __call__(
    self,
    x: ArrayLike,
    *,
    step: Scalar | None = None,
    train: bool = False,
    mask: ArrayLike | None = None,
  ) -> jax.Array:
    """Normalises the last axis.

    Args:
      x: [..., D] activations.
      step: optimiser step; None means that of `psa_jax.at_step`.
      train: move the running statistics.
      mask: [...] positions that count in the statistics; None counts all.

    Raises:
      ValueError: another number of features, or a mask that does not fit.
    """
    x = jnp.asarray(x)
    if x.shape[-1:] != (self.num_features,):
      raise ValueError(
        f'x {x.shape} must have {self.num_features} features, as num_features '
        'says'
      )
    if step is None:
      step = steps.scoped('gamma of PRepBN moves')
    if not x.size:  # no mean of nothing moves the statistics
      return x
    mask = None if mask is None else jnp.asarray(mask)
    return super().__call__(x, step=step, train=train, mask=mask)
