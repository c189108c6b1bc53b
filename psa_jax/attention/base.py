"""What an attention mechanism is, and the registry of all of them.

A mechanism is a function of arrays

    mechanism(q, k, v, *, config, step, segment_ids, train, causal, learned)
      -> AttnOut

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

from psa_jax.attention.dense import dense
from psa_jax.attention.psa import psa
from psa_jax.config import AttentionConfig, ConfigError, ModelConfig
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
  """Makes the module of a mechanism that has parameters.

  The module answers `module(x, *, rope) -> Learned` for the layer's
  normalised input x [B, T, D] and the rotary table of its positions.
  """

  def __call__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module: ...


MECHANISMS: dict[str, Mechanism] = {'dense': dense, 'psa': psa}
PARAMETERS: dict[str, Parameters] = {}


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

  def run(step, q, k, v, segment_ids, learned):
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
    )

  args = step, q, k, v, segment_ids, learned if name == own else None
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*args)
  return _sharded(run, mesh, *args)


def _sharded(run, mesh, step, q, k, v, segment_ids, learned):
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
    out, aux = run(*args)
    axes = (*BATCH_AXES, HEAD_AXIS)
    return out, jax.tree.map(lambda x: jax.lax.pmean(x, axes), aux)

  by_head, by_row = P(batch, None, HEAD_AXIS), P(batch)
  own = jax.tree.map(lambda _: P(), learned)
  if own is not None:
    own = own._replace(
      heads=jax.tree.map(lambda _: by_head, learned.heads),
      tokens=jax.tree.map(lambda _: by_row, learned.tokens),
    )
  documents = None if segment_ids is None else by_row
  specs = P(), by_head, by_head, by_head, documents, own
  out, aux = jax.shard_map(
    local, in_specs=specs, out_specs=(by_head, P()), check_vma=False
  )(step, q, k, v, segment_ids, learned)
  return AttnOut(out, aux)
