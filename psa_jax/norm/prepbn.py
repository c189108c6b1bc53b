"""PRepBN and its arms: from a per-token norm to one that folds into weights.

SLAB, arXiv 2405.11582, equations 3 to 5:

  PRepBN(x) = gamma * Base(x) + (1 - gamma) * RepBN(x)
  RepBN(x)  = BN(x) + eta * x,   eta one learnable scalar per layer
  gamma     = max(0, (T - (step - warmup)) / T), 1 during the warm-up

Base is LayerNorm in the paper's vision models and RMSNorm in its language
model. Base and BN keep their own affine parameters. The arms `rmsnorm`,
`layernorm`, `batchnorm` and `repbn` are the terms on their own.

What is decided here:

* gamma comes from the optimiser step that the caller passes, in training and
  in evaluation alike. The reference code counts forward calls (gradient
  accumulation and rematerialisation shorten its T) and evaluates with
  gamma = 0 at any step.
* Statistics are means over every position of the batch that `mask` counts. A
  mask without a single token leaves the running statistics alone and normalises
  by them.
* A batch is normalised by its biased variance (n in the denominator), and the
  running variance follows the unbiased one (n - 1), as in PyTorch's BatchNorm,
  which the reference code is made of. Flax has the biased one in both places.
* Base and BN have an epsilon each, as there: 1e-6 and 1e-5.
* Arrays are global under `jax.jit`, so these plain means are already
  synchronised over a sharded batch. Inside `shard_map` or `pmap` they would
  be local: do not call the layer there.
* Running statistics move on every training forward, from the first step: also
  while gamma is 1, so that RepBN's are warm when gamma starts to fall (the
  reference code leaves its RepBN unrun, hence cold, in the warm-up). Under
  gradient accumulation every micro-batch moves them once; rematerialisation
  does not move them twice. They are `nnx.BatchStat` variables: a compiled
  step has to return them.
* `statistics='batch'` normalises a training batch by its own statistics. In a
  causal model every position then sees a little of its future (and of the
  other sequences); the loss in training is not comparable with evaluation.
  `statistics='running'` normalises by the running statistics as they were
  before this batch, which leaks nothing and is what evaluation does too.

At gamma = 0 a layer folds into the weights beside it: `fold.py`. Statistics can
be recalibrated after training: `train/recalibrate.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from psa_jax import schedules
from psa_jax.config import ConfigError, NormConfig
from psa_jax.kernels import unread
from psa_jax.types import Scalar

BASES = ('rmsnorm', 'layernorm')
BATCH_KINDS = ('batchnorm', 'repbn', 'prepbn')
NONE = 'none'  # folded into the weights beside it; see `fold.py`


def gamma(config: NormConfig, step: Scalar) -> Float[Array, '']:
  """Weight of the base norm at `step`: 1 for RMSNorm and LayerNorm."""
  if config.kind == 'prepbn':
    return schedules.prepbn_gamma(
      step, warmup_steps=config.warmup_steps, decay_steps=config.decay_steps
    )
  return jnp.float32(config.kind in BASES)


class Norm(nnx.Module):
  """One normalisation layer; `config.kind` says which.

  Attributes:
    scale, bias: affine of the base norm (RMSNorm has no bias).
    bn_scale, bn_bias: affine of the batch norm.
    eta: RepBN's scalar weight of the identity.
    mean, var: f32 running statistics.
  """

  def __init__(
    self, dim: int, config: NormConfig, *, param_dtype=jnp.float32, rngs
  ):
    """Creates the parameters that the kind needs and no others.

    Args:
      dim: size of the last axis of the inputs.
      config: kind, constants and PRepBN's schedule.
      param_dtype: dtype of the parameters; statistics are always f32.
      rngs: unused, every initial value is a constant.

    Raises:
      ConfigError: impossible values, or initial values from which a
        Transformer cannot learn.
    """
    del rngs
    _validate(config)
    self.config = config
    base = config.base if config.kind == 'prepbn' else config.kind
    self.base = base if base in BASES else ''
    if self.base:
      self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
    if self.base == 'layernorm':
      self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))
    if config.kind in BATCH_KINDS:
      self.bn_scale = nnx.Param(
        jnp.full((dim,), config.scale_init, param_dtype)
      )
      self.bn_bias = nnx.Param(jnp.zeros((dim,), param_dtype))
      self.mean = nnx.BatchStat(jnp.zeros((dim,), jnp.float32))
      self.var = nnx.BatchStat(jnp.ones((dim,), jnp.float32))
    if config.kind in ('repbn', 'prepbn'):
      self.eta = nnx.Param(jnp.full((), config.eta_init, param_dtype))

  def __call__(
    self,
    x: Float[Array, '*B D'],
    *,
    step: Scalar,
    train: bool,
    mask: Shaped[Array, '*B'] | None = None,
  ) -> Float[Array, '*B D']:
    """Normalises the last axis of `x` in f32; returns the dtype of `x`.

    Args:
      x: activations.
      step: optimiser step, which sets gamma.
      train: move the running statistics (and, with `statistics='batch'`,
        normalise by the batch).
      mask: positions that count in the statistics (true or non-zero); None
        counts all. Whatever the others hold, NaN included, stays out of
        the statistics, and out of their gradients.

    Raises:
      ValueError: a mask whose shape is not that of `x` without its last axis.
    """
    if mask is not None and mask.shape != x.shape[:-1]:
      raise ValueError(
        f'mask {mask.shape} must have the shape of x {x.shape} without its '
        'last axis'
      )
    # One row a token: XLA's sums over two leading axes, which the gradients
    # of the affine parameters are, cost 5 to 8 times those over one on CPU.
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    mask, bad = None if mask is None else mask.reshape(-1), None
    if mask is not None and self.config.kind in BATCH_KINDS:
      # Its own output is NaN, but 0 times that would be in all gradients.
      bad = (mask == 0) & ~unread.finite(rows)
      rows = jnp.where(bad[:, None], 0, rows)
    y = self._rows(rows, step=step, train=train, mask=mask)
    if bad is not None:
      y = unread.spoil(y, bad)
    return y.reshape(x.shape).astype(x.dtype)

  def _rows(self, x, *, step, train, mask):
    kind = self.config.kind
    if kind == NONE:
      return x
    if kind in BASES:
      return self._base(x)
    batch = self._batch_norm(x, train=train, mask=mask)
    if kind != 'batchnorm':
      batch = batch + self.eta[...].astype(jnp.float32) * x
    if kind == 'prepbn':
      weight = gamma(self.config, step)
      batch = weight * self._base(x) + (1 - weight) * batch
    return batch

  def _base(self, x: jax.Array) -> jax.Array:
    if self.base == 'layernorm':
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    # Where a square overflows, rsqrt gives 0: a model that has blown up would
    # answer with its biases, and its loss look like a guess.
    inverse = jax.lax.rsqrt(power + self.config.base_eps)
    y = x * jnp.where(jnp.isinf(power), jnp.nan, inverse)
    y = y * _row(self.scale[...])
    return y + _row(self.bias[...]) if self.base == 'layernorm' else y

  def _batch_norm(self, x, *, train, mask):
    mean, var = self.mean[...], self.var[...]
    if train:
      batch_mean, batch_var, count = _moments(x, mask, mean, var)
      unbiased = batch_var * (count / jnp.maximum(count - 1, 1))
      self._move_statistics(batch_mean, jnp.where(count > 1, unbiased, var))
      if self.config.statistics == 'batch':
        mean, var = batch_mean, batch_var
    inverse = jax.lax.rsqrt(var + self.config.bn_eps)
    y = (x - _row(mean)) * _row(inverse)
    return y * _row(self.bn_scale[...]) + _row(self.bn_bias[...])

  def _move_statistics(self, mean, var):
    # Written as a move, so that equal statistics move by exactly nothing.
    weight = 1 - self.config.momentum
    mean, var = jax.lax.stop_gradient((mean, var))
    self.mean[...] = self.mean[...] + weight * (mean - self.mean[...])
    self.var[...] = self.var[...] + weight * (var - self.var[...])


def _moments(x, mask, empty_mean, empty_var):
  """Mean and biased variance [D] of the counted positions, and their number.

  Without any counted position they are `empty_mean` and `empty_var`, which
  for the running statistics means no move.
  """
  if mask is None:
    return jnp.mean(x, axis=0), jnp.var(x, axis=0), jnp.float32(len(x))
  counts = jnp.expand_dims(mask != 0, -1)
  total = jnp.sum(counts, dtype=jnp.float32)
  some, total = total > 0, jnp.maximum(total, 1)
  mean = jnp.sum(jnp.where(counts, x, 0), axis=0) / total
  mean = jnp.where(some, mean, empty_mean)
  centred = jnp.where(counts, x - _row(mean), 0)
  var = jnp.sum(jnp.square(centred), axis=0) / total
  return mean, jnp.where(some, var, empty_var), total


def _row(values):
  """`values` [D] as f32 [1, D]."""
  return values.astype(jnp.float32)[None]


def _validate(config: NormConfig) -> None:
  """Refuses initial values from which no layer behind the norm learns."""
  if config.kind not in BATCH_KINDS:
    return
  starts_at_base = (
    config.kind == 'prepbn' and config.warmup_steps + config.decay_steps > 0
  )
  eta = 0.0 if config.kind == 'batchnorm' else config.eta_init
  if not starts_at_base and config.scale_init == 0 and eta == 0:
    raise ConfigError(
      f'norm.kind={config.kind!r} with norm.scale_init=0 outputs 0 everywhere '
      'and no layer behind it learns; set norm.scale_init=1'
    )
