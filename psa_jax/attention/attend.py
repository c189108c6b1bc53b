"""Self-attention by the mechanism that the configuration names, on any mesh.

`attend` refuses what the mechanism cannot do before anything is traced, and
under a mesh runs it inside `shard_map`: batch rows over `data` and `fsdp`,
heads over `tensor`, so that a mechanism and its kernel see whole rows and whole
groups of heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from psa_jax.attention import registry
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, ConfigError
from psa_jax.config.attention import names, require_config
from psa_jax.types import AttnOut, Learned

BATCH_AXES = ('data', 'fsdp')
HEAD_AXIS = 'tensor'


def attend(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  context: AttentionContext,
  learned: Learned | None = None,
) -> AttnOut:
  """Self-attention by the configured mechanism.

  Args:
    q: queries, rotated already.
    k: keys; S = T.
    v: values.
    config: names the mechanism and holds its settings.
    context: step, documents, budget, whether causal and whether training.
    learned: what the parameters of the mechanism made of the layer's input;
      None for one without parameters.

  Returns:
    The output and its f32 scalars. Under a mesh the scalars are means over the
    shards.

  Raises:
    ConfigError: an unknown mechanism, something that it cannot do, or heads
      that the mesh cannot split.
  """
  require_config(config)
  spec = registry.get(config.name)
  _check(spec, context, learned)

  def run(q, k, v, context, learned):
    return spec.function(
      q, k, v, config=config, context=context, learned=learned
    )

  return on_mesh(run, q, k, v, context, learned)


def on_mesh(
  run: Callable[..., Any],
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  context: AttentionContext,
  learned: Learned | None,
  *,
  measured: bool = False,
) -> Any:
  """`run(q, k, v, context, learned)` inside `shard_map`, if there is a mesh.

  Args:
    run: returns an `AttnOut`, or with `measured` a pair of it and an array
      [B, T] that is summed over the heads of all shards.
    q: queries.
    k: keys.
    v: values.
    context: see `attend`.
    learned: see `attend`.
    measured: what `run` returns.

  Raises:
    ConfigError: heads that the mesh cannot split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(q, k, v, context, learned)
  heads = mesh.shape[HEAD_AXIS]
  if k.shape[2] % heads:
    raise ConfigError(
      f'mesh.{HEAD_AXIS}={heads} does not divide {k.shape[2]} kv heads; lower '
      f'mesh.{HEAD_AXIS} or raise model.num_kv_heads'
    )
  rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  batch = BATCH_AXES if q.shape[0] % rows == 0 else None
  # A mechanism reads no rotary table and no mask of norm statistics.
  context = dataclasses.replace(context, rope=None, mask=None)

  def local(traced, segment_ids, q, k, v, learned):
    step, budget = traced
    shard = dataclasses.replace(
      context, step=step, budget=budget, segment_ids=segment_ids
    )
    result = run(q, k, v, shard, learned)
    (out, aux), mass = result if measured else (result, None)
    aux = jax.tree.map(
      lambda x: jax.lax.pmean(x, (*BATCH_AXES, HEAD_AXIS)), aux
    )
    if measured:
      mass = jax.lax.psum(mass, HEAD_AXIS)
    return out, aux, mass

  by_head, by_row = P(batch, None, HEAD_AXIS), P(batch)
  documents = None if context.segment_ids is None else by_row
  of_learned = jax.tree.map(lambda _: P(), learned)
  if learned is not None:
    of_learned = learned._replace(
      heads=jax.tree.map(lambda _: by_head, learned.heads),
      tokens=jax.tree.map(lambda _: by_row, learned.tokens),
      weights=jax.tree.map(lambda _: P(), learned.weights),
    )
  out, aux, mass = jax.shard_map(
    local,
    in_specs=(P(), documents, by_head, by_head, by_head, of_learned),
    out_specs=(by_head, P(), by_row),
    check_vma=False,
  )((context.step, context.budget), context.segment_ids, q, k, v, learned)
  result = AttnOut(out, aux)
  return (result, mass) if measured else result


def _check(
  spec: registry.MechanismSpec,
  context: AttentionContext,
  learned: Learned | None,
) -> None:
  """Refuses what a mechanism cannot do."""
  name = spec.name
  if spec.causal_only and not context.causal:
    raise ConfigError(
      f'attention {name} is causal, but causal=False was asked for; a '
      'bidirectional model takes one of '
      f'{", ".join(names(causal_only=False))}'
    )
  if context.budget is not None and not spec.takes_budget:
    raise ConfigError(
      f'attention {name} has no budget that can be set; '
      f'{" and ".join(names(takes_budget=True))} have'
    )
  if spec.needs_learned and learned is None:
    raise ConfigError(
      f'attention {name} has learned parameters, but learned is None; give '
      'what the module made by its MechanismSpec.parameters returns'
    )
