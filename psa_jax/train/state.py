"""The train state: plain arrays, and the program that gives them a meaning.

A model is an NNX module, but no module crosses `jax.jit` (the graph mode of
`nnx.jit` costs milliseconds a step, and `jax.jit(module)` drops the updates
of running statistics without a word). `Program` holds what is static, the
module's structure; `TrainState` holds its arrays as nested dicts, the
optimiser's, and the one step counter that drives every schedule.

The state is built abstractly first (`jax.eval_shape`), so its shardings are
known before a byte is allocated, then by one compiled call that puts each
shard where it belongs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from psa_jax import models, sharding
from psa_jax.config import Config, ConfigError, ControllerConfig
from psa_jax.train import controller, optim


class TrainState(NamedTuple):
  """Everything that a run is, apart from its place in the data.

  The same structure holds abstract shapes, or shardings.

  Attributes:
    step: int32, optimiser updates made so far.
    params: trained arrays.
    model_state: every other array of the model (running statistics).
    opt_state: Adam's moments.
    fault: int32, 0 or which check of `step.FAULTS` an update failed, counted
      from 1. From then on the state does not change.
    controller: what sets attention's budget; () without one.
  """

  step: Any
  params: Any
  model_state: Any
  opt_state: Any
  fault: Any
  controller: Any = ()


class Program(NamedTuple):
  """The static half of a run.

  Attributes:
    graphdef: the module's structure without its arrays.
    optimizer: gradients to directions (see `optim.make_optimizer`).
    mesh: devices.
    abstract: shape, dtype and sharding of every array of the state.
    config: the run.
    vocab_size: the tokenizer's.
    classes: outputs of the model's head; 0 for none.
  """

  graphdef: Any
  optimizer: optax.GradientTransformation
  mesh: Mesh
  abstract: TrainState
  config: Config
  vocab_size: int
  classes: int = 0

  def merge(self, params: Any, model_state: Any) -> nnx.Module:
    """The module with these arrays in it.

    They may be another program's that holds more: see `read_by`.
    """
    params = _picked(params, self.abstract.params)
    model_state = _picked(model_state, self.abstract.model_state)
    return nnx.merge(self.graphdef, params, model_state)

  def read_by(self, mechanism: str) -> 'Program':
    """The program whose model reads the same weights with another attention.

    Args:
      mechanism: its name. What the configured one learned for itself is left
        out; the other one's own parameters have to be there.
    """
    if mechanism == self.config.model.attention.name:
      return self
    attention = self.config.model.attention.read_by(mechanism)
    model = dataclasses.replace(self.config.model, attention=attention)
    # Nothing trains with this program, and the controller is the other one's.
    train = dataclasses.replace(
      self.config.train, controller=ControllerConfig()
    )
    config = dataclasses.replace(self.config, model=model, train=train)
    return make_program(
      config, self.vocab_size, self.mesh, classes=self.classes
    )

  def model_state(self, model: nnx.Module) -> Any:
    """The arrays of a module that are not trained, after it ran."""
    return nnx.to_pure_dict(nnx.state(model, nnx.filterlib.Not(nnx.Param)))

  @property
  def shardings(self) -> TrainState:
    """Where every array of the state lives."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def make_program(
  config: Config, vocab_size: int, mesh: Mesh, *, classes: int = 0
) -> Program:
  """Builds the model and its state abstractly; allocates nothing.

  Args:
    config: the run.
    vocab_size: the tokenizer's.
    mesh: from `sharding.make_mesh`.
    classes: outputs of an encoder's head.

  Raises:
    ConfigError: a model that cannot be built.
  """
  optimizer = optim.make_optimizer(config.optim)
  structure = {}

  def init():
    graphdef, state = _create(config, vocab_size, classes, optimizer, 0)
    structure['graphdef'] = graphdef
    return state

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(init)
  shardings = _shardings(shapes, optimizer, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  return Program(
    structure['graphdef'],
    optimizer,
    mesh,
    abstract,
    config,
    vocab_size,
    classes,
  )


def abstract_state(config: Config, vocab_size: int, mesh: Mesh) -> TrainState:
  """Shape, dtype and sharding of a run's state; allocates nothing."""
  return make_program(config, vocab_size, mesh).abstract


def init_state(config: Config, vocab_size: int, program: Program) -> TrainState:
  """The state before the first step, each shard built where it lives."""

  def init(seed):
    return _create(
      config, vocab_size, program.classes, program.optimizer, seed
    )[1]

  # It runs once: on a CPU, optimising it takes several times longer than it
  # saves.
  on_cpu = jax.default_backend() == 'cpu'
  options = {'xla_backend_optimization_level': 0} if on_cpu else None
  with jax.set_mesh(program.mesh):
    init = jax.jit(
      init, out_shardings=program.shardings, compiler_options=options
    )
    return init(jnp.uint32(config.seed))


def adopt(
  state: TrainState, saved: Mapping[str, Any]
) -> tuple[TrainState, list[str]]:
  """A first state that begins with another run's parameters and statistics.

  Parameters of an attention mechanism that the other run did not have (the
  indexer of dsa, for a dense run) keep their initial values. Step, optimiser
  and controller begin anew.

  Args:
    state: from `init_state`.
    saved: `params` and `model_state` of the other run, as nested dicts.

  Returns:
    The state, and the names of the arrays that kept their initial values.

  Raises:
    ConfigError: another model: an array is missing or of another shape.
  """
  new = []

  def take(part):
    def one(path, x):
      value, name = saved.get(part, {}), jax.tree_util.keystr(path)
      for entry in path:
        value = value.get(entry.key) if isinstance(value, Mapping) else None
      if value is None and any(entry.key == 'mechanism' for entry in path):
        new.append(name)
        return x
      if value is None or value.shape != x.shape:
        had = 'none' if value is None else f'one of shape {value.shape}'
        raise ConfigError(
          f'train.init_from is the run of another model: {name} has shape '
          f'{x.shape}, the checkpoint has {had}'
        )
      return jax.device_put(value.astype(x.dtype), x.sharding)

    return jax.tree.map_with_path(one, getattr(state, part))

  params, model_state = take('params'), take('model_state')
  return state._replace(params=params, model_state=model_state), new


def _picked(tree: Any, like: Any) -> Any:
  """The nested dicts of `tree` with the keys that `like` has.

  Raises:
    ConfigError: a key of `like` is not there: the weights are those of a model
      without the parameters of this attention.
  """
  if not isinstance(like, Mapping):
    return tree
  missing = [key for key in like if key not in tree]
  if missing:
    raise ConfigError(
      f'the weights have no {", ".join(missing)}, which this attention learns; '
      'read them with the attention that they were trained with, or with dense'
    )
  return {key: _picked(tree[key], value) for key, value in like.items()}


def _create(config, vocab_size, classes, optimizer, seed):
  rngs = nnx.Rngs(jax.random.key(seed))
  model = models.build(config.model, vocab_size, classes=classes, rngs=rngs)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  params = nnx.to_pure_dict(params)
  state = TrainState(
    step=jnp.int32(0),
    params=params,
    model_state=nnx.to_pure_dict(rest),
    # f32 moments whatever the parameters' dtype
    opt_state=optimizer.init(optax.tree.cast(params, jnp.float32)),
    fault=jnp.int32(0),
    controller=controller.init(config.train.controller),
  )
  return graphdef, state


def _shardings(shapes: TrainState, optimizer, mesh: Mesh) -> TrainState:
  """Moments live with their parameters, scalars everywhere."""
  whole = sharding.replicated(mesh)
  params = sharding.tree_shardings(shapes.params, mesh)
  return TrainState(
    step=whole,
    params=params,
    model_state=sharding.tree_shardings(shapes.model_state, mesh),
    opt_state=optax.tree_map_params(
      optimizer,
      lambda _, where: where,
      shapes.opt_state,
      params,
      transform_non_params=lambda _: whole,
    ),
    fault=whole,
    controller=jax.tree.map(lambda _: whole, shapes.controller),
  )
