"""Training losses.

`next_token_loss` is the sum over tokens of -log p(target), in nats. The
vocabulary's logits are the largest array of a language model at long context
(65,536 tokens x 50,000 entries is 13 GB in f32), so they are computed for a
chunk of the sequence at a time and again in the backward pass.

`answer_loss` is for tasks that judge a few positions only: no other logits
exist at all. `label_loss` is for one label a row.

These are not optax's: `softmax_cross_entropy_with_integer_labels` gathers the
target's logit, which does not stay split over a vocabulary on several devices,
and rounds otherwise than `log_softmax`; nothing there works in chunks.

Not done: a fused kernel, z-loss, and label smoothing of tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def next_token_loss(
  model: Any,
  hidden: Float[Array, 'B T D'],
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  *,
  chunk: int,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Sums -log p(target) in nats over a batch, without all of its logits.

  Args:
    model: `model.unembed` turns [B, t, D] hidden states into [B, t, V] logits.
    hidden: final hidden states.
    targets: the token after each position.
    weights: what each position counts; 0 leaves it out of the value and of
      the gradient, whatever its hidden state.
    chunk: most tokens whose logits exist at a time. A chunk takes the same
      positions of every row, so it is at least B.

  Returns:
    The weighted sum of the losses and the sum of the weights, both f32.
  """
  length = hidden.shape[1]
  size = min(length, max(1, chunk // hidden.shape[0]))
  count = -(-length // size)

  def piece(hidden, targets, weights):
    logits = model.unembed(counted(hidden, weights))
    return _weighted_nats(logits, targets, weights)

  weights = weights.astype(jnp.float32)
  if count == 1:
    nats = piece(hidden, targets, weights)
  else:
    piece = jax.checkpoint(piece, prevent_cse=False)
    pieces = tuple(_split(x, count, size) for x in (hidden, targets, weights))
    nats, _ = jax.lax.scan(
      lambda total, xs: (total + piece(*xs), None), jnp.float32(0), pieces
    )
  return nats, jnp.sum(weights)


def answer_loss(
  model: Any,
  hidden: Float[Array, 'B T D'],
  answers: Int[Array, 'B Q L'],
  targets: Int[Array, 'B Q L'],
  weights: Float[Array, 'B Q'],
) -> tuple[Float[Array, ''], Float[Array, ''], Bool[Array, 'B Q']]:
  """Sums -log p(target) in nats over the answers to some questions.

  Args:
    model: `model.unembed` turns [B, t, D] hidden states into [B, t, V] logits.
    hidden: final hidden states.
    answers: positions whose logits are judged, L for each of Q questions.
    targets: the token after each of them.
    weights: what each question counts.

  Returns:
    The weighted sum of the losses of all answer tokens, the sum of their
    weights, and for each question whether all of its tokens are most likely.
  """
  B, Q, L = answers.shape
  at = jnp.take_along_axis(hidden, answers.reshape(B, Q * L, 1), axis=1)
  weights = weights.astype(jnp.float32)
  each = jnp.broadcast_to(weights[..., None], (B, Q, L)).reshape(B, Q * L)
  logits = model.unembed(counted(at, each))
  nats = _weighted_nats(logits, targets.reshape(B, Q * L), each)
  right = jnp.argmax(logits, axis=-1).reshape(B, Q, L) == targets
  return nats, jnp.sum(each), jnp.all(right, axis=-1)


def label_loss(
  logits: Float[Array, 'B V'],
  labels: Int[Array, 'B'],
  weights: Float[Array, 'B'],
  *,
  smoothing: float = 0.0,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Sums -log p(label) in nats over a batch.

  Args:
    logits: of the classes, f32.
    labels: the right class of each row.
    weights: what each row counts; 0 leaves it out, whatever its logits.
    smoothing: share of a label that is spread evenly over all classes
      (arXiv 1512.00567, section 7).

  Returns:
    The weighted sums of the losses, and of the rows whose label is most
    likely.
  """
  log_p = jax.nn.log_softmax(counted(logits, weights))
  hit = jnp.arange(logits.shape[-1])[None] == labels[:, None]
  nats = -jnp.sum(jnp.where(hit, log_p, 0), -1)
  if smoothing:
    nats = (1 - smoothing) * nats - smoothing * log_p.mean(-1)
  right = jnp.argmax(logits, -1) == labels
  return jnp.sum(nats * weights), jnp.sum(right * weights)


def counted(
  x: Float[Array, '*rows D'], weights: Float[Array, '*#rows']
) -> Float[Array, '*rows D']:
  """`x`, and 0 where nothing counts: there it may be NaN.

  Belongs in front of a head: the gradient of its matrix adds 0 times what
  counts nothing.
  """
  return jnp.where((weights != 0)[..., None], x, 0)


def _weighted_nats(logits, targets, weights):
  # A comparison instead of a gather: its gradient is not a scatter, and a
  # vocabulary that is split over devices stays split.
  hit = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
  of_target = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
  nats = jax.nn.logsumexp(logits, axis=-1) - of_target
  return jnp.sum(nats * weights)


def _split(x, count, size):
  """[B, T, ...] to [count, B, size, ...]; the end is filled with zeros."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, count * size - x.shape[1])
  x = jnp.pad(x, pad) if pad[1][1] else x
  x = x.reshape(x.shape[0], count, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)
