"""What an attention mechanism is, and the registry of all of them.

A mechanism is a function of arrays

    mechanism(q, k, v, *, config, step, segment_ids, train, causal, learned)
      -> AttnOut

(one that `config.BUDGETED` names also takes `budget`, below)

that decides *which* keys a query reads (its own sub-config of
`AttentionConfig` and the optimiser step say how much) and calls a kernel from
`psa_jax/kernels` that reads only those. To add one: write a file here, add its
sub-config to `AttentionConfig`, its name to the options of
`AttentionConfig.name`, a line to `MECHANISMS`, and a row to the contract table
in `tests/attention/test_contract.py`. One with parameters of its own also gets
a line in `PARAMETERS`: a module that the attention layer owns and whose call
turns the layer's input into the `Learned` arrays that the function is given.
"""

import dataclasses
import math
from typing import Protocol

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from psa_jax.attention import cascade as cascade_lib
from psa_jax.attention import topk_parameters
from psa_jax.attention.cascade import cascade
from psa_jax.attention.dense import dense
from psa_jax.attention.dsa import dsa
from psa_jax.attention.dsa_parameters import Indexer
from psa_jax.attention.hybrid import hybrid
from psa_jax.attention.nsa import nsa, nsa_tile
from psa_jax.attention.nsa_parameters import NsaParameters
from psa_jax.attention.on_demand import on_demand
from psa_jax.attention.psa import psa
from psa_jax.attention.sla import sla
from psa_jax.attention.sla_parameters import SlaParameters
from psa_jax.attention.topk import topk
from psa_jax.config import (
  BUDGETED,
  AttentionConfig,
  ConfigError,
  ModelConfig,
)
from psa_jax.types import AttnOut, Learned, Scalar

BATCH_AXES = ('data', 'fsdp')
HEAD_AXIS = 'tensor'


class Mechanism(Protocol):
  """The call that every mechanism answers; see the module docstring."""

  def __call__(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K Hv'],
    *,
    config: AttentionConfig,
    step: Scalar,
    segment_ids: Int[Array, 'B T'] | None,
    train: bool,
    causal: bool,
    learned: Learned | None,
  ) -> AttnOut: ...


class Parameters(Protocol):
  """Makes the module of a mechanism that has parameters, or None.

  The module answers `module(x, *, rope) -> Learned` for the layer's
  normalised input x [B, T, D] and the rotary table of its positions.
  """

  def __call__(
    self, config: ModelConfig, *, rngs: nnx.Rngs
  ) -> nnx.Module | None: ...


MECHANISMS: dict[str, Mechanism] = {
  'dense': dense,
  'psa': psa,
  'topk': topk,
  'hybrid': hybrid,
  'on_demand': on_demand,
  'nsa': nsa,
  'nsa_tile': nsa_tile,
  'dsa': dsa,
  'sla': sla,
  'cascade': cascade,
}
PARAMETERS: dict[str, Parameters] = {
  'topk': topk_parameters.make,
  'dsa': Indexer,
  'sla': SlaParameters,
  'nsa': NsaParameters,
  'nsa_tile': NsaParameters,
}


def attend(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  *,
  config: AttentionConfig,
  step: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
  train: bool = True,
  causal: bool = True,
  learned: Learned | None = None,
  mechanism: str | None = None,
  budget: Scalar | None = None,
) -> AttnOut:
  """Self-attention by the configured mechanism.

  Args:
    q: queries, rotated already.
    k: keys; S = T.
    v: values.
    config: names the mechanism and holds its settings.
    step: optimiser step that the schedules are read at.
    segment_ids: no attention between different ids, if given.
    train: whether this is a training step; a mechanism may have its own
      budget outside training.
    causal: whether a query reads only keys up to its own position; not every
      mechanism can do otherwise.
    learned: what the parameters of the configured mechanism made of the
      layer's input; None for one without parameters.
    mechanism: overrides `config.name` (evaluation with dense attention).
    budget: share of the visible keys that the configured mechanism may read,
      in place of its schedule (see `train.controller`); traced.

  Returns:
    The output and its f32 scalars. Under a mesh the mechanism runs inside
    `shard_map`, batch rows over `data` and `fsdp`, heads over `tensor`, and
    the scalars are means over the shards.

  Raises:
    ConfigError: an unknown mechanism, or heads that the mesh cannot split.
  """
  name = mechanism or config.name
  if name not in MECHANISMS:
    raise ConfigError(
      f'unknown attention {name!r}; choose from {sorted(MECHANISMS)}'
    )

  own = config.name
  if name != own:
    # The implementation was named for the configured mechanism.
    config = dataclasses.replace(config, implementation='auto')
    budget = None
  if budget is not None and name not in BUDGETED:
    raise ConfigError(
      f'attention {name} has no budget that can be set; {BUDGETED} have'
    )

  def run(when, q, k, v, segment_ids, learned):
    step, budget = when
    given = {} if budget is None else {'budget': budget}
    return MECHANISMS[name](
      q,
      k,
      v,
      config=config,
      step=step,
      segment_ids=segment_ids,
      train=train,
      causal=causal,
      learned=learned,
      **given,
    )

  when = step, budget
  args = when, q, k, v, segment_ids, learned if name == own else None
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*args)
  return _sharded(run, mesh, *args)


def attend_and_measure(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K Hv'],
  *,
  config: AttentionConfig,
  step: Scalar,
  segment_ids: Int[Array, 'B T'] | None = None,
  causal: bool = True,
) -> tuple[AttnOut, Float[Array, 'B T']]:
  """`attend` by cascade pruning, and the importance that its tokens got.

  Args and errors as in `attend`. The importance is summed over the heads of
  all shards.
  """

  def run(step, q, k, v, segment_ids, learned):
    del learned
    return cascade_lib.attend_and_measure(
      q,
      k,
      v,
      config=config,
      step=step,
      segment_ids=segment_ids,
      causal=causal,
    )

  args = step, q, k, v, segment_ids, None
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*args)
  return _sharded(run, mesh, *args, measured=True)


def _sharded(run, mesh, when, q, k, v, segment_ids, learned, measured=False):
  """`run` inside shard_map: every shard has whole rows and whole groups."""
  heads = mesh.shape[HEAD_AXIS]
  if k.shape[2] % heads:
    raise ConfigError(
      f'mesh.{HEAD_AXIS}={heads} does not divide {k.shape[2]} kv heads; lower '
      f'mesh.{HEAD_AXIS} or raise model.num_kv_heads'
    )
  rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  batch = BATCH_AXES if q.shape[0] % rows == 0 else None

  def local(*args):
    (out, aux), mass = run(*args) if measured else (run(*args), None)
    axes = (*BATCH_AXES, HEAD_AXIS)
    aux = jax.tree.map(lambda x: jax.lax.pmean(x, axes), aux)
    if measured:
      mass = jax.lax.psum(mass, HEAD_AXIS)
    return out, aux, mass

  by_head, by_row = P(batch, None, HEAD_AXIS), P(batch)
  own = jax.tree.map(lambda _: P(), learned)
  if own is not None:
    own = own._replace(
      heads=jax.tree.map(lambda _: by_head, learned.heads),
      tokens=jax.tree.map(lambda _: by_row, learned.tokens),
    )
  documents = None if segment_ids is None else by_row
  specs = P(), by_head, by_head, by_head, documents, own
  out, aux, mass = jax.shard_map(
    local, in_specs=specs, out_specs=(by_head, P(), by_row), check_vma=False
  )(when, q, k, v, segment_ids, learned)
  found = AttnOut(out, aux)
  return (found, mass) if measured else found
