"""What an attention mechanism is, and the table of all of them.

A mechanism is a function of arrays

    mechanism(q, k, v, *, config, context, learned) -> AttnOut

that decides *which* keys a query reads (its settings and the optimiser step say
how much) and calls a kernel from `psa_jax/kernels` that reads only those. Its
`MechanismSpec` holds every other fact about it. The configuration, the layer,
the mesh, folding and training ask the spec; none of them lists mechanisms.

Adding one inside the package is one file with a `register` call, one import
line in `psa_jax/attention/__init__.py` and one row of the contract table,
`tests/attention/test_contract.py`. Outside it is the same call,
`psa_jax.register(spec)`. See docs/adding.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, Int

from psa_jax import sharding
from psa_jax.attention.context import AttentionContext
from psa_jax.config import AttentionConfig, ConfigError, MechanismConfig
from psa_jax.config import attention as config_lib
from psa_jax.config.errors import wrong_type
from psa_jax.types import AttnOut, Learned


@runtime_checkable
class Function(Protocol):
  """The call that every mechanism answers."""

  def __call__(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K Hv'],
    *,
    config: AttentionConfig,
    context: AttentionContext,
    learned: Learned | None = None,
  ) -> AttnOut: ...


@runtime_checkable
class CrossFunction(Protocol):
  """Reads the first `lengths` keys of every row of another sequence.

  It has no `segment_ids` to obey, and reports `cross_density`.
  """

  def __call__(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K Hv'],
    *,
    lengths: Int[Array, 'B'],
    config: AttentionConfig,
    context: AttentionContext,
    learned: Learned | None = None,
  ) -> AttnOut: ...


@runtime_checkable
class Parameters(Protocol):
  """Makes the module of a mechanism that has parameters, or None.

  The module answers `module(x, *, rope) -> Learned` for the layer's
  normalised input x [B, T, D] and the rotary table of its positions.
  """

  def __call__(self, config: Any, *, rngs: nnx.Rngs) -> nnx.Module | None: ...


@dataclass(frozen=True, kw_only=True)
class MechanismSpec:
  """Every fact about a mechanism.

  Attributes:
    name: `model.attention.name`.
    function: self-attention.
    config: class of its settings, with their ranges and checks.
    section: key of these settings under `model.attention`; the name, if empty.
      Mechanisms that share their settings share a section.
    parameters: makes the module that the attention layer owns, called with the
      `ModelConfig`; None where nothing is learned.
    needs_learned: whether the function cannot do without what it makes.
    needs_rotary: whether what it learns turns keys of its own, so that the
      layer must have a rotary table.
    axes: names of the axes of its parameters, by their last name, as in
      `sharding.PARAMETERS`.
    causal_only: whether a bidirectional model cannot have it.
    cross: reads another sequence, or a cache; None if it cannot.
    takes_budget: whether `context.budget` can take the place of its schedule.
    approximates_softmax: whether it reads with `model.attention.softmax`.
    reads_norm: whether its own parameters read the normalised stream, so that
      the norm in front of it does not fold. None: if it has parameters.
    prunes_stack: whether its layers differ in size, so that a stack of its own
      runs them (`models/cascade.py`).
  """

  name: str
  function: Function
  config: type[MechanismConfig]
  section: str = ''
  parameters: Parameters | None = None
  needs_learned: bool = False
  needs_rotary: bool = False
  axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
  causal_only: bool = False
  cross: CrossFunction | None = None
  takes_budget: bool = False
  approximates_softmax: bool = False
  reads_norm: bool | None = None
  prunes_stack: bool = False

  def __post_init__(self):
    """Fills in what depends on other fields.

    Raises:
      ConfigError: a name that cannot be a key, or settings of another kind.
    """
    if not self.name.isidentifier():
      raise ConfigError(
        f'MechanismSpec.name is {self.name!r}, but a name is one word of '
        'letters, digits and underscores'
      )
    is_section = isinstance(self.config, type) and issubclass(
      self.config, MechanismConfig
    )
    if not is_section:
      raise ConfigError(
        wrong_type(
          'MechanismSpec.config', 'a subclass of MechanismConfig', self.config
        )
      )
    object.__setattr__(self, 'section', self.section or self.name)
    if self.reads_norm is None:
      object.__setattr__(self, 'reads_norm', self.parameters is not None)

  @property
  def reads_cross(self) -> bool:
    """Whether it reads other sequences."""
    return self.cross is not None


def register(spec: MechanismSpec) -> MechanismSpec:
  """Makes a mechanism known under its name; returns the spec.

  From then on `model.attention.name` and the section of its settings are keys
  of the configuration.

  Raises:
    ConfigError: the name is taken, the section belongs to other settings, or
      its parameters have names that others give other axes.
  """
  known = config_lib.MECHANISMS
  if spec.name in known and known[spec.name] != spec:
    raise ConfigError(
      f'attention {spec.name!r} is registered already; give the mechanism '
      'another name'
    )
  taken = config_lib.sections().get(spec.section, spec.config)
  if taken is not spec.config:
    raise ConfigError(
      f'section {spec.section!r} of model.attention holds a '
      f'{taken.__name__}; give the mechanism another section'
    )
  sharding.name_axes(spec.axes)
  known[spec.name] = spec
  return spec


def get(name: str) -> MechanismSpec:
  """The spec of a mechanism.

  Raises:
    ConfigError: there is none of this name; the nearest one is named.
  """
  spec = config_lib.find(name)
  assert isinstance(spec, MechanismSpec)  # `register` is the only way in
  return spec


def names() -> tuple[str, ...]:
  """All mechanisms, in the order of registration."""
  return tuple(config_lib.MECHANISMS)
