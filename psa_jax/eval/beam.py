"""Beam search over any model that goes on a token at a time.

Every step keeps the `beam` hypotheses a row whose log-probability is highest;
one that has ended stays as it is and competes on. In the end the best of them
is that of the highest log-probability / length ** `penalty`, the end token
counted. A beam of 1 is greedy decoding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Hypotheses(NamedTuple):
  """The best hypothesis of every row.

  Attributes:
    tokens: [B, T]; the end token where it has ended.
    score: its log-probability / length ** penalty.
  """

  tokens: Int[Array, 'B T']
  score: Float[Array, 'B']


class _Beam(NamedTuple):
  at: Int[Array, '']
  tokens: Int[Array, 'B W T']
  total: Float[Array, 'B W']
  ended: Bool[Array, 'B W']
  state: Any


def search(
  advance: Callable[[Any, Array, Array], tuple[Array, Any]],
  reorder: Callable[[Any, Array], Any],
  state: Any,
  *,
  rows: int,
  beam: int,
  length: int,
  begin: int,
  end: int,
  penalty: float = 1.0,
) -> Hypotheses:
  """Searches; traceable.

  Args:
    advance: (state, tokens [B, W], place []) to logits [B, W, V] and the state
      after these tokens.
    reorder: (state, parents [B, W]) to the state whose hypothesis w is the old
      `parents[:, w]`.
    state: of W = `beam` hypotheses a row.
    rows: B.
    beam: W.
    length: T, most tokens of a hypothesis.
    begin: the token before the first.
    end: the token that ends.
    penalty: 0 prefers short hypotheses, 1 compares means.
  """
  shape = (rows, beam)
  alone = jnp.where(jnp.arange(beam) == 0, 0, -jnp.inf)
  first = _Beam(
    at=jnp.int32(0),
    tokens=jnp.full((*shape, length), end, jnp.int32),
    # All hypotheses start as the empty one; only one of them counts.
    total=jnp.broadcast_to(alone[None], shape).astype(jnp.float32),
    ended=jnp.zeros(shape, bool),
    state=state,
  )

  def goes_on(now: _Beam):
    return (now.at < length) & ~now.ended.all()

  def grow(now: _Beam) -> _Beam:
    before = jax.lax.dynamic_index_in_dim(
      now.tokens, jnp.maximum(now.at - 1, 0), axis=2, keepdims=False
    )
    before = jnp.where(now.at == 0, begin, before)
    logits, state = advance(now.state, before, now.at)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    vocabulary = log_p.shape[-1]
    is_end = (jnp.arange(vocabulary) == end)[None, None]
    stay = jnp.where(is_end, 0, -jnp.inf)
    log_p = jnp.where(now.ended[..., None], stay, log_p)
    total = now.total[..., None] + log_p
    total, chosen = jax.lax.top_k(total.reshape(rows, -1), beam)
    parents, new = chosen // vocabulary, chosen % vocabulary
    tokens = jnp.take_along_axis(now.tokens, parents[..., None], axis=1)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, new, now.at, axis=2)
    ended = jnp.take_along_axis(now.ended, parents, axis=1) | (new == end)
    return _Beam(now.at + 1, tokens, total, ended, reorder(state, parents))

  last = jax.lax.while_loop(goes_on, grow, first)
  sizes = jnp.minimum((last.tokens != end).sum(-1) + 1, length)
  score = last.total / sizes.astype(jnp.float32) ** penalty
  best = jnp.argmax(score, -1)[:, None]
  tokens = jnp.take_along_axis(last.tokens, best[..., None], axis=1)[:, 0]
  return Hypotheses(tokens, jnp.take_along_axis(score, best, axis=1)[:, 0])
