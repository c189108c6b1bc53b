"""What the scorer is told of each query, and what a stop rule is shown."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Ranges(NamedTuple):
  """Where the blocks lie as seen from each query, as block numbers.

  Attributes:
    begin: the first visible block.
    end: one past the last visible block.
    scored: blocks before it, from `begin` on, compete by their score; their
      keys must all be visible to the query.
    sink: visible blocks before it come first in the list,
    near: and so do those from it on.
  """

  begin: Int[Array, 'B Tb']
  end: Int[Array, 'B Tb']
  scored: Int[Array, 'B Tb']
  sink: Int[Array, 'B Tb']
  near: Int[Array, 'B Tb']

  def visible(self) -> Int[Array | np.ndarray, 'B Tb']:
    """How many blocks are visible."""
    return self.end - self.begin

  def forced(self) -> Int[Array | np.ndarray, 'B Tb']:
    """How many of them come first whatever their score."""
    sink = (self.sink - self.begin).clip(0, self.visible())
    near = self.end - self.near.clip(self.begin, self.end)
    return (sink + near).clip(max=self.visible())

  def masks(self, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every block: whether it competes, is forced, is visible.

    Returns:
      Three of [B, 1, Tb, blocks], bool.
    """
    j = jnp.arange(blocks).reshape(1, 1, 1, -1)
    begin, end, scored, sink, near = (x[:, None, :, None] for x in self)
    visible = (j >= begin) & (j < end)
    return (
      (j >= begin) & (j < scored),
      visible & ((j < sink) | (j >= near)),
      visible,
    )


class Scores(NamedTuple):
  """The scores of some queries while they exist; see `api.top_blocks`.

  Attributes:
    estimate: logits of the softmax mass of each block, `log size + q . mean`:
      never more than the truth (Jensen).
    bound: what blocks are ranked by: the same, or with bounds an upper bound,
      `log size + max over the box of (q . k)`.
    eligible: which blocks compete; the others' scores mean nothing.
  """

  estimate: Float[Array, 'B K n G Nb']
  bound: Float[Array, 'B K n G Nb']
  eligible: Bool[Array, 'B 1 n 1 Nb']
