"""Simplified linear attention (`sla`) of SLAB, arXiv 2405.11582, section 3.3.

  q = relu(q),  k = relu(k + P)
  O = q (sum_s k[s]^T v[s]) / (q . sum_s k[s] + 1e-6)  +  conv(v)

with a learned bias P of the position, added to the keys before the ReLU, and a
depthwise convolution of the values, 5 taps wide, with a bias and weights that
all heads share. No softmax, no scale, sums in f32 whatever the inputs.

The paper has it for a fixed number of image tokens. Here

* P has a fixed number of rows. Row p belongs to position p of a document and
  the last row to every position from there on, so any length can be read and
  nothing depends on how long the sequence will become. Queries and keys carry
  rotary positions besides, as for every mechanism.
* Causal: the sums run up to the query, and the convolution over the token and
  the four before it; bidirectional, over two on either side. Both stop at the
  borders of documents.
* The convolution runs along the sequence, not over a grid of image patches.

`density` says what a query costs: it reads a state of H rows in place of its
visible keys, H as a share of them. All keys have an influence, and no setting
makes it dense softmax attention.

Decoding keeps the state and four values, whatever the length (`step`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from psa_jax.attention.block_lists import document_start
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.registry import MechanismSpec, register
from psa_jax.config import AttentionConfig, MechanismConfig, ModelConfig
from psa_jax.config.fields import COUNT, number
from psa_jax.kernels import unread
from psa_jax.kernels.linear_attention import linear_attention
from psa_jax.types import AttnOut, Learned

EPS = 1e-6
TAPS = 5


@dataclass(frozen=True)
class SlaConfig(MechanismConfig):
  """Simplified linear attention (docs/mechanisms.md#sla).

  Attributes:
    positions: rows of the learned position bias; later tokens of a document
      share the last one.
  """

  positions: int = number(1024, COUNT)


class SlaParameters(nnx.Module):
  """Position bias and convolution of `sla`.

  Attributes:
    sla_position: [P, K, H], zero-initialised.
    sla_conv: [5, H] and sla_bias: [H], shared by all heads.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Creates the parameters."""
    dtype = jnp.dtype(config.param_dtype)
    width = config.head_dim or config.d_model // config.num_heads
    rows = config.attention.sla.positions
    table = jnp.zeros((rows, config.num_kv_heads, width), dtype)
    self.sla_position = nnx.Param(table)
    taps = nnx.initializers.lecun_normal()
    self.sla_conv = nnx.Param(taps(rngs.params(), (TAPS, width), dtype))
    self.sla_bias = nnx.Param(jnp.zeros((width,), dtype))

  def __call__(self, x: Float[Array, 'B T D'], *, rope: Any) -> Learned:
    """The parameters as they are; the table once for every row of `x`."""
    del rope
    table = self.sla_position[...][None]
    table = jnp.broadcast_to(table, (x.shape[0], *table.shape[1:]))
    weights = {'conv': self.sla_conv[...], 'conv_bias': self.sla_bias[...]}
    return Learned(heads={'position': table}, weights=weights)


class SlaState(NamedTuple):
  """What decoding remembers of a row.

  Attributes:
    total: sum of k^T v over the document so far, with sum k as last column.
    recent: values of the last four tokens, oldest first; 0 before the first.
    position: of the next token in its document.
  """

  total: Float[Array, 'B K H Hv1']
  recent: Float[Array, 'B R K Hv']
  position: Int[Array, 'B']


def sla(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Linear attention and a convolution of the values; see `attend`.

  `learned` has `position` [B, P, K, H] among its heads (the same for all rows;
  the axis is there so that a mesh can split it), and `conv` [5, Hv] and
  `conv_bias` [Hv] among its weights.
  """
  assert learned is not None  # the spec needs it
  segment_ids, causal = context.segment_ids, context.causal
  B, T = q.shape[:2]
  at = jnp.arange(T)[None] - document_start(segment_ids, B, T)
  out = linear_attention(
    jax.nn.relu(q),
    jax.nn.relu(k + _position(learned, at).astype(k.dtype)),
    v,
    causal=causal,
    segment_ids=segment_ids,
    eps=EPS,
    implementation=config.implementation,
  )
  local = _convolve(v, learned, segment_ids, causal)
  out = _add(out, local)
  return AttnOut(out, {'density': _density(q, at, segment_ids, causal)})


def empty_state(
  batch: int, kv_heads: int, head_dim: int, value_dim: int, dtype
) -> SlaState:
  """The state before the first token; `dtype` is that of the values."""
  return SlaState(
    jnp.zeros((batch, kv_heads, head_dim, value_dim + 1), jnp.float32),
    jnp.zeros((batch, TAPS - 1, kv_heads, value_dim), dtype),
    jnp.zeros((batch,), jnp.int32),
  )


def step(
  state: SlaState,
  q: Float[Array, 'B 1 N H'],
  k: Float[Array, 'B 1 K H'],
  v: Float[Array, 'B 1 K Hv'],
  *,
  learned: Learned,
  new_document: Bool[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'B 1 N Hv'], SlaState]:
  """One more token a row: what `sla` gives at that position.

  Args:
    state: after the tokens before; `empty_state` before the first.
    q: queries of the newest tokens,
    k: their keys,
    v: and values.
    learned: as in prefill, with rows for this batch.
    new_document: rows whose token begins another document.
  """
  B, _, N, H = q.shape
  K = k.shape[2]
  if new_document is not None:
    state = jax.tree.map(
      lambda x: jnp.where(
        new_document.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x
      ),
      state,
    )
  bias = _position(learned, state.position[:, None]).astype(k.dtype)
  k = jax.nn.relu(k + bias)[:, 0].astype(jnp.float32)
  x = v[:, 0].astype(jnp.float32)
  x = jnp.concatenate([x, jnp.ones((B, K, 1))], -1)
  total = state.total + k[..., :, None] * x[..., None, :]
  rows = jax.nn.relu(q).astype(jnp.float32).reshape(B, K, N // K, H)
  sums = jnp.einsum('bkgh,bkhv->bkgv', rows, total)
  out = sums[..., :-1] / (sums[..., -1:] + EPS)
  values = jnp.concatenate([state.recent, v], 1)
  taps = learned.weights['conv'].astype(jnp.float32)
  local = jnp.einsum('brkv,rv->bkv', values.astype(jnp.float32), taps)
  bias = learned.weights['conv_bias'].astype(jnp.float32)
  local = local + bias[None, None]
  out = out.reshape(B, 1, N, -1).astype(v.dtype)
  state = SlaState(total, values[:, 1:], state.position + 1)
  return _add(out, local[:, None]), state


def _position(learned, at):
  """[B, T, K, H] rows of P for positions `at` [1 or B, T]."""
  table = learned.heads['position']
  at = jnp.minimum(at, table.shape[1] - 1)
  if at.shape[0] == 1:
    return jnp.take(table, at[0], axis=1)
  return jnp.take_along_axis(table, at[..., None, None], axis=1)


def _convolve(v, learned, segment_ids, causal):
  """[B, T, K, Hv] f32: five shifted copies of the values, added."""
  taps = learned.weights['conv'].astype(jnp.float32)
  T, x, bad = v.shape[1], v.astype(jnp.float32), ~unread.finite(v)
  x, reads = unread.clean(x), jnp.zeros_like(bad)
  first = 1 - TAPS if causal else -(TAPS // 2)
  out = jnp.broadcast_to(
    learned.weights['conv_bias'][None, None, None], v.shape
  )
  out = out.astype(jnp.float32)
  for tap in range(TAPS):
    shift = first + tap  # the token that this tap reads, as seen from its own
    pad = (max(-shift, 0), max(shift, 0))

    def shifted(a, pad=pad, shift=shift):
      a = jnp.pad(a, [(0, 0), pad] + [(0, 0)] * (a.ndim - 2))
      return a[:, max(shift, 0) :][:, :T]

    piece = shifted(x) * taps[tap][None, None, None]
    seen = shifted(bad)
    if segment_ids is not None:
      same = (shifted(segment_ids) == segment_ids)[..., None]
      piece, seen = jnp.where(same[..., None], piece, 0), same & seen
    out, reads = out + piece, reads | seen
  return unread.spoil(out, reads)


def _add(out, local):
  """Adds a kv head's convolution [B, T, K, Hv] to each of its query heads."""
  B, T, N, width = out.shape
  local = jnp.repeat(local, N // local.shape[2], axis=2)
  return (out.astype(jnp.float32) + local).astype(out.dtype)


def _density(q, at, segment_ids, causal):
  """Rows of the state as a share of the visible keys, a mean over queries."""
  T, width = q.shape[1], q.shape[-1]
  visible = at + 1
  if not causal:
    if segment_ids is None:
      visible = jnp.full_like(at, T)
    else:  # from the other end: how many follow in the document
      behind = jnp.arange(T)[None] - document_start(
        jnp.flip(segment_ids, 1), *segment_ids.shape
      )
      visible = visible + jnp.flip(behind, 1)
  return jnp.minimum(1, width / visible.astype(jnp.float32)).mean()


SPEC = register(
  MechanismSpec(
    name='sla',
    function=sla,
    config=SlaConfig,
    parameters=SlaParameters,
    needs_learned=True,
    axes={
      'sla_position': ('positions', 'kv', 'head_dim'),
      'sla_conv': ('taps', 'head_dim'),
      'sla_bias': ('head_dim',),
    },
    reads_norm=False,  # bias and taps depend on no token
  )
)
