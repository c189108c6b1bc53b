"""Cascade pruning over a whole stack of layers: what is pruned is gone.

SpAtten, arXiv 2012.09852. In front of a layer that keeps less than the one
before it, the surviving rows of the residual stream are gathered to the
layer's static size, so queries, keys, values and the feed-forward layer of all
later layers have fewer rows; the weights of the surviving heads are gathered
likewise. A pruned token's output is its residual stream as it left; at the end
every row is back in its place. Rotary positions are those of the input.
`attention/cascade/survivors.py` says how many rows a layer has and who fills
them.

What is different in a causal model:

* Tokens are judged when they come, by their own attention only, and their
  number follows a quota that any prefix obeys; see `survivors.py`. A layer may
  then have fewer tokens than rows; the spare rows hold something that nothing
  reads.
* Heads: the paper's sum over all queries of the sentence would let the last
  token choose the heads of the first. They are chosen by a running mean of the
  same sum over earlier training batches instead (`HeadImportance` of the
  mechanism, a statistic like a batch norm's), so one choice holds for
  all rows. An encoder chooses anew for every row, as the paper does for a
  sentence; documents that share a row share the choice, and so have a say in
  each other's heads.

The schedule `amount` scales all that is pruned. Sizes are static, so it climbs
a short ladder of rungs: each is a branch of one `lax.switch` on the step, all
are compiled in one program, one runs. Rounding is towards less pruning. Rows
that are really gone cannot be had from a traced count in a fixed size, and a
stage of its own in the trainer for each rung would compile the whole train
step for each; the price here is that the program holds every rung. The share
of values, which has no shape, follows the schedule at every step.

Not done: heads that `mesh.tensor` cannot split evenly after pruning are
refused; a mesh that splits rows only takes any.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from psa_jax import schedules
from psa_jax.attention.cascade import survivors
from psa_jax.attention.cascade.attention import Pruning
from psa_jax.attention.cascade.settings import CascadeConfig
from psa_jax.attention.context import AttentionContext
from psa_jax.attention.rotary import Rotary
from psa_jax.config import ModelConfig
from psa_jax.models.blocks import remat
from psa_jax.models.drop import drops
from psa_jax.types import Scalar

PADDING = 0  # segment id of what is no token, in a bidirectional model
DEAD = -1  # segment id of spare rows
MOMENTUM = 0.9  # of the running mean of head importance
_SEED = 2012  # of random importance


class Rows(NamedTuple):
  """The rows that are left, all [B, n].

  Attributes:
    place: position in the input.
    alive: holds a token; the rows that do come first, in order.
    score: cumulative importance.
    document: number of the token's document in the row.
    budget: tokens that its quota is a share of: those of the document up to
      it in a causal model, else all of the document.
    segment: segment id; DEAD where not alive.
  """

  place: jax.Array
  alive: jax.Array
  score: jax.Array
  document: jax.Array
  budget: jax.Array
  segment: jax.Array


def rungs(config: CascadeConfig) -> tuple[float, ...]:
  """Values of `amount` that have a program, ascending."""
  amount = config.amount
  if amount.kind == 'constant':
    return (amount.init,)
  if amount.kind == 'piecewise':
    return tuple(sorted(set(amount.values)))
  low, high = sorted((amount.init, amount.final))
  if low == high:
    return (low,)
  step = (high - low) / config.rungs
  between = tuple(low + step * i for i in range(1, config.rungs))
  return (low, *between, high)


class Cascade:
  """Runs stacked blocks, smaller and smaller."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    context: AttentionContext,
  ):
    """Remembers what all layers share.

    Args:
      graphdef: structure of one block.
      config: the model.
      context: of all rows. In a bidirectional model the segment id `PADDING` is
        no document: it is read by nothing and leaves first.
    """
    self.graphdef, self.config = graphdef, config
    self.cascade = config.attention.cascade
    self.context = context
    self.step, self.train = context.step, context.train
    self.causal = context.causal
    self.drops = drops(config, self.step, train=self.train)
    self.learns_heads = self.causal and self.cascade.prunes_heads

  def __call__(self, x, arrays):
    """The residual stream [B, T, D], moved statistics, and means of scalars.

    Args:
      x: [B, T, D] embedded tokens.
      arrays: parameters and statistics with a leading axis of length L.
    """
    context = self.context
    rope, segment_ids, mask = context.rope, context.segment_ids, context.mask
    amounts = rungs(self.cascade)
    branches = [functools.partial(self._run, amount) for amount in amounts]
    operands = x, arrays, rope, segment_ids, mask
    if len(branches) == 1:
      return branches[0](*operands)
    amount = schedules.make(self.cascade.amount)(self.step)
    passed = amount + 1e-6 >= jnp.asarray(amounts[1:], jnp.float32)
    return lax.switch(jnp.sum(passed), branches, *operands)

  def _run(self, amount, x, arrays, rope, segment_ids, mask):
    """One rung: all layers at static sizes."""
    K, packed = self.config.num_kv_heads, segment_ids is not None
    sizes = survivors.plan(
      self.cascade,
      self.config.num_layers,
      tokens=x.shape[1],
      kv_heads=K,
      amount=amount,
      packed=packed,
    )
    rows = start = self._start(x, segment_ids)
    heads, importance, share, alive = None, 0, survivors.UNIT, None
    if packed and not self.causal:
      alive = rows.alive
    remaining, there = x, (rope, mask)
    statistics, scalars = [], []
    for index, size in enumerate(sizes):
      if size.share < share:
        x = _write(x, remaining, rows)
        rows = self._prune(rows, size, share, packed)
        remaining, share = _take(x, rows.place), size.share
        # Shapes tell that no row is spare in an encoder without padding.
        alive = rows.alive if packed or self.causal else None
        there = _rope_at(rope, rows.place), _mask_at(mask, rows.place, alive)
      if size.heads < (K if heads is None else heads.shape[-1]):
        heads = _choose_heads(importance, heads, size.heads)
      # What is measured serves the layers behind that hold less than this one.
      measured = self.learns_heads or size[1:] != sizes[-1][1:]
      layer = functools.partial(self._layer, measured or heads is not None)
      remaining, (stats, aux, gained) = remat(
        layer, self.config.remat, in_scan=False
      )(
        remaining,
        jax.tree.map(lambda array, i=index: array[i], (arrays, self.drops)),
        *there,
        # A causal query does not see the spare rows anyway: they come last.
        rows.segment if packed else None,
        alive,
        heads[0] if self.causal and heads is not None else heads,
      )
      if gained is not None:
        if self.cascade.importance == 'attention':
          rows = rows._replace(score=rows.score + gained.tokens)
        importance = _add_heads(importance, gained.heads, heads)
      statistics.append(stats)
      shares = self._shares(start, rows, size.heads / K, packed)
      scalars.append(aux | shares)
    x = remaining if share == survivors.UNIT else _write(x, remaining, rows)
    aux = jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *scalars)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics), aux

  def _layer(
    self, measured, x, arrays_and_drop, rope, mask, segment_ids, alive, heads
  ):
    """One block: the residual stream, and everything that it says."""
    arrays, drop = arrays_and_drop
    block = nnx.merge(self.graphdef, *arrays)
    context = dataclasses.replace(
      self.context, rope=rope, segment_ids=segment_ids, mask=mask
    )
    run = functools.partial(
      block.pruned if measured else block, context=context, drop=drop
    )
    if not measured:
      # The program of dense attention, to the bit where nothing was pruned.
      (x, aux), gained = run(x), None
    else:
      x, aux, gained = run(x, Pruning(heads, alive))
      gained = lax.stop_gradient(gained)
      if self.learns_heads:
        gained = self._learn_heads(block.attention, gained, x, alive, heads)
    stats = nnx.as_pure(nnx.state(block, nnx.BatchStat))
    return x, (stats if self.train else None, aux, gained)

  def _learn_heads(self, attention, gained, x, alive, heads):
    """Moves the running importance; what it was before is what prunes."""
    statistic = attention.mechanism.head_importance
    at = slice(None) if heads is None else heads
    old = statistic[...][at]
    if self.train:
      # A mean over tokens, so that it does not depend on the batch's size.
      count = x.shape[0] * x.shape[1] if alive is None else alive.sum()
      size = gained.heads.sum(0) / jnp.maximum(count, 1)
      new = old + (1 - MOMENTUM) * (size - old)
      statistic[...] = statistic[...].at[at].set(new)
    return gained._replace(heads=old[None])

  def _shares(self, start: Rows, rows: Rows, heads: float, packed: bool):
    """Scalars of a layer: what it reads and holds, as shares of the whole."""
    read, visible = (
      survivors.pairs(x.document if packed else None, x.alive, self.causal)
      for x in (rows, start)
    )
    read = jnp.where(visible > 0, read / jnp.maximum(visible, 1), 1)
    tokens, every = (x.alive.sum().astype(jnp.float32) for x in (rows, start))
    return {
      'density': read.mean() * heads,
      'kept_tokens': tokens / jnp.maximum(every, 1),
      'kept_heads': jnp.float32(heads),
    }

  def _start(self, x, segment_ids) -> Rows:
    """All rows."""
    B, T = x.shape[:2]
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    alive = jnp.ones((B, T), bool)
    if segment_ids is None:
      segment = jnp.zeros((B, T), jnp.int32)
      document, token_place, length = survivors.whole_row(B, T)
    else:
      segment = segment_ids
      document, token_place, length = survivors.runs(segment)
      if not self.causal:
        alive = segment != PADDING
    budget = token_place if self.causal else length
    score = jnp.zeros((B, T), jnp.float32)
    if self.cascade.importance == 'random':
      score = _chance(x, self.step)
    return Rows(place, alive, score, document, budget, segment)

  def _prune(self, rows: Rows, size, share: int, packed: bool) -> Rows:
    """The rows of the next layer, which keeps `size.share` instead of `share`.

    Where `packed` is false a row is one document; without causality none of
    its rows is spare then.
    """
    cfg = self.cascade
    generous = rows.document < cfg.documents
    quotas = survivors.quota(rows.budget, size.share, generous)
    quotas = jnp.where(rows.alive, quotas, 0)
    document = None
    if packed:
      document = jnp.where(rows.alive, rows.document, DEAD)
    if self.causal:
      kept = survivors.keep_causal(
        rows.score,
        rows.alive,
        quotas,
        document,
        shares=(size.share, share),
        window=cfg.window,
        credit=cfg.credit,
      )
    else:
      kept = survivors.keep_bidirectional(rows.score, quotas, document)
    at, alive = survivors.compact(kept, size.tokens)
    rows = jax.tree.map(lambda x: _take(x, at), rows)
    segment = jnp.where(alive, rows.segment, DEAD)
    return rows._replace(alive=alive, segment=segment)


def _chance(x, step: Scalar):
  """Uniform numbers [B, T], others for every text, step and model."""
  key = jax.random.fold_in(jax.random.key(_SEED), step)
  text = lax.bitcast_convert_type(x.astype(jnp.float32).sum((1, 2)), jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, text)
  return jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:2]))(keys)


def _take(x, at):
  """Entries [B, n, ...] of x [B, T, ...]."""
  return jnp.take_along_axis(
    x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1
  )


def _rope_at(rope: Rotary | None, place) -> Rotary | None:
  """Angles of the positions that are left."""
  if rope is None:
    return None
  B, T = place.shape[0], rope.cos.shape[1]
  every = (jnp.broadcast_to(x, (B, T, x.shape[-1])) for x in rope)
  return Rotary(*(_take(x, place) for x in every))


def _mask_at(mask, place, alive):
  """The mask of what is left; spare rows do not count."""
  if mask is None:
    return alive
  mask = _take(mask, place)
  return mask if alive is None else jnp.where(alive, mask, 0)


def _write(x, remaining, rows: Rows):
  """Puts the rows that are left back into their places [B, T, D]."""
  B, T = x.shape[:2]
  place = jnp.where(rows.alive, rows.place, T)
  return x.at[jnp.arange(B)[:, None], place].set(remaining, mode='drop')


def _choose_heads(importance, heads, count: int):
  """The most important [R, count] of the kv heads that are left."""
  if heads is None:
    heads = jnp.broadcast_to(
      jnp.arange(importance.shape[1], dtype=jnp.int32)[None], importance.shape
    )
  return survivors.top_heads(importance, heads, count)


def _add_heads(importance, gained, heads):
  """Adds what the heads that are left [R, n] got to the sums [R, K]."""
  if heads is None:
    return importance + gained
  rows = jnp.arange(heads.shape[0])[:, None]
  return importance.at[rows, heads].add(gained)
