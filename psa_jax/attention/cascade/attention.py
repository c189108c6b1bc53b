"""Cascade pruning (`cascade`): SpAtten, arXiv 2012.09852, one layer of it.

The mechanism is a property of a whole model: a token that has got little
attention so far, or a head that has added little, leaves and never returns, so
every later layer is smaller. `models/cascade.py` runs the layers and
`survivors.py` says who leaves; here is what happens inside a layer: dense
attention over what is left, with local value pruning, and the two measures of
importance.

  token j   s_t[j] += sum over heads and queries of P[n, t, j]
  head n    s_h[n] += sum over queries and channels of |output of head n|

Called on q, k and v alone, as every mechanism can be, it is dense attention
with local value pruning: nothing was pruned before, and nothing comes after.

In a causal model a sum over all queries would let the future decide what
becomes of the past, through a discrete choice that no gradient shows. What is
known of token j at position j is the part of the paper's sum that its own
query makes, sum over heads of P[n, j, j]; that is its measure there. Heads are
judged by earlier batches, see `models/cascade.py`.

Query heads that share a key and value head (GQA, younger than the paper) stay
or go together, and their measures are added: otherwise the shared keys would
have to stay for the last of them. With G = 1 this is the paper's rule.

A measure is a sum in f32, as the paper defines it, and not a logarithm: tokens
whose every probability is below 1e-38 tie, and go by position.

No gradient flows through a measure.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from psa_jax import schedules
from psa_jax.attention.cascade.settings import CascadeConfig
from psa_jax.attention.cascade.survivors import runs, whole_row
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig
from psa_jax.kernels.dense import dense_attention
from psa_jax.kernels.dense.columns import column_mass, self_mass
from psa_jax.kernels.dense.few_values import few_values_attention
from psa_jax.types import AttnOut, Learned, Scalar


class Pruning(NamedTuple):
  """What is left in front of a layer, for `SelfAttention`.

  Attributes:
    heads: kv heads that are left, ascending; one set for all rows, or one a
      row. None is all.
    alive: rows of `x` that hold a token that counts; None is all.
  """

  heads: Int[Array, 'n'] | Int[Array, 'B n'] | None = None
  alive: Bool[Array, 'B T'] | None = None


class Importance(NamedTuple):
  """What a layer adds to the importance of its tokens and kv heads; f32."""

  tokens: Float[Array, 'B T']
  heads: Float[Array, 'B n']


def cascade(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Dense attention with local value pruning; see `attend`.

  The aux scalars are `density`, which is 1 (every score is computed), and
  `kept_values`: the share of the visible values that is read.
  """
  del learned  # of heads only, which `models/cascade.py` reads
  out, _, aux = _attention(q, k, v, config, context)
  return AttnOut(out, aux)


def attend_and_measure(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
) -> tuple[AttnOut, Float[Array, 'B T']]:
  """`cascade`, and what its probabilities add to the importance of tokens.

  The probabilities are those before value pruning. Bidirectional attention
  computes its scores a second time for them.
  """
  segment_ids = context.segment_ids
  out, lse, aux = _attention(q, k, v, config, context)
  if context.causal:
    mass = self_mass(q, k, lse)
  else:
    mass = column_mass(
      q,
      k,
      lse,
      causal=False,
      q_segment_ids=segment_ids,
      kv_segment_ids=segment_ids,
      streamed=config.implementation != 'reference',
    )
  return AttnOut(out, aux), mass


def head_importance(
  out: Float[Array, 'B T N Hv'],
  kv_heads: int,
  alive: Bool[Array, 'B T'] | None = None,
) -> Float[Array, 'B K']:
  """Sum over queries and channels of |out|, of the heads of each group.

  Args:
    out: attention's output before the last projection.
    kv_heads: K, how many groups the N heads form.
    alive: rows that count; None counts all.
  """
  size = jnp.abs(lax.stop_gradient(out).astype(jnp.float32)).sum(-1)
  if alive is not None:
    size = jnp.where(alive[..., None], size, 0)
  return size.sum(1).reshape(out.shape[0], kv_heads, -1).sum(-1)


def value_keep(config: CascadeConfig, step: Scalar):
  """Share of the visible values that a query reads at `step`; f32 scalar."""
  amount = schedules.make(config.amount)(step)
  return 1 - amount * jnp.float32(1 - config.value_keep)


def _attention(q, k, v, config, context):
  """Output, log-sum-exp and aux scalars."""
  one, causal = jnp.float32(1), context.causal
  segment_ids = context.segment_ids
  where = dict(q_segment_ids=segment_ids, kv_segment_ids=segment_ids)
  where |= dict(causal=causal, implementation=config.implementation)
  if config.cascade.value_keep == 1:
    out, lse = dense_attention(q, k, v, **where)
    return out, lse, {'density': one, 'kept_values': one}
  visible = visible_keys(segment_ids, *q.shape[:2], causal=causal)
  # The small constant keeps rounding in f32 from adding a value.
  share = value_keep(config.cascade, context.step) * visible.astype(jnp.float32)
  counts = jnp.clip(jnp.ceil(share - 1e-3).astype(jnp.int32), 1, visible)
  out, lse = few_values_attention(q, k, v, counts, **where)
  kept = ((visible - counts) / visible).mean()
  return out, lse, {'density': one, 'kept_values': 1 - kept}


def visible_keys(
  segment_ids: Int[Array, 'B T'] | None, B: int, T: int, *, causal: bool
) -> Int[Array, 'B T']:
  """How many keys every query can read."""
  whole = segment_ids is None
  _, position, length = whole_row(B, T) if whole else runs(segment_ids)
  return position if causal else length
