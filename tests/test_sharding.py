"""Meshes, the names of arrays, and where they live; eight fake devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from psa_jax import models, sharding
from psa_jax.attention.topk import TopkConfig
from psa_jax.config import (
  AttentionConfig,
  ConfigError,
  MeshConfig,
  ModelConfig,
  NormConfig,
)
from psa_jax.norm import prepbn


@pytest.mark.parametrize(
  ('asked', 'shape'),
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 1, -1), (1, 1, 8)),
    ((2, 2, 2), (2, 2, 2)),
    ((1, 1, 1), (1, 1, 1)),
    ((3, 1, 2), (3, 1, 2)),
  ],
)
def test_mesh_shapes(asked, shape):
  mesh = sharding.make_mesh(MeshConfig(*asked))
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    ((-1, 3, 1), 'do not divide 8 devices'),
    ((-1, 16, 1), 'do not divide 8 devices'),
    ((4, 4, 1), 'needs 16 devices, this run has 8'),
    ((-1, -1, 1), 'only one may be -1'),
    ((0, 1, 1), 'must be -1 or at least 1'),
    ((-2, 1, 1), 'must be -1 or at least 1'),
  ],
)
def test_impossible_meshes_are_refused(asked, message):
  with pytest.raises(ConfigError, match=message):
    sharding.make_mesh(MeshConfig(*asked))


def specs(tree, **mesh):
  mesh = sharding.make_mesh(MeshConfig(**{'data': 1, **mesh}))
  found = sharding.tree_shardings(tree, mesh)
  return jax.tree.map(lambda s: s.spec, found)


def test_rules_for_single_and_stacked_arrays():
  tree = {
    'embedding': jnp.zeros((6, 4)),
    'layers': {'wq': jnp.zeros((3, 4, 2, 5)), 'scale': jnp.zeros((3, 4))},
    'w_down': jnp.zeros((6, 4)),
    'eta': jnp.zeros(()),
  }
  assert specs(tree, fsdp=2, tensor=2) == {
    'embedding': P('tensor', 'fsdp'),
    'layers': {'wq': P(None, 'fsdp', 'tensor', None), 'scale': P(None, None)},
    'w_down': P('tensor', 'fsdp'),
    'eta': P(),
  }


def test_an_axis_that_does_not_divide_leaves_the_dimension_whole():
  tree = {'wk': jnp.zeros((6, 1, 4)), 'embedding': jnp.zeros((257, 6))}
  assert specs(tree, fsdp=2, tensor=4) == {
    'wk': P('fsdp', None, None),
    'embedding': P(None, 'fsdp'),
  }


@pytest.mark.parametrize('shape', [(4,), (2, 3, 4, 5, 6)])
def test_an_array_of_unknown_name_or_rank_is_refused(shape):
  with pytest.raises(ValueError, match='psa_jax.sharding.PARAMETERS'):
    specs({'wq': jnp.zeros(shape)})
  with pytest.raises(ValueError, match="'new'"):
    specs({'layers': {'new': jnp.zeros((2, 2))}})


@pytest.mark.parametrize('kind', (*prepbn.BASES, *prepbn.BATCH_KINDS))
def test_every_array_of_every_model_has_names(kind):
  config = ModelConfig(
    d_model=8, num_heads=2, mlp_dim=8, norm=NormConfig(kind, scale_init=1.0)
  )
  check_names(config)


@pytest.mark.parametrize(
  ('attention', 'names'),
  [
    (
      AttentionConfig('topk', topk=TopkConfig(learnable=True)),
      {'coefficients'},
    )
  ],
)
def test_every_array_of_a_mechanism_has_names(attention, names):
  config = ModelConfig(d_model=8, num_heads=2, mlp_dim=8, attention=attention)
  assert names <= check_names(config)


def check_names(config):
  """Looks up every array of the model; their last names."""
  for scan_layers in (True, False):
    config = dataclasses.replace(config, scan_layers=scan_layers)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1))):
      shapes = jax.eval_shape(lambda c=config: state_of(c))
    jax.tree.map_with_path(sharding.axis_names, shapes)
  return {path[-1].key for path, _ in jax.tree.leaves_with_path(shapes)}


def state_of(config):
  from flax import nnx

  model = models.build(config, 16, rngs=nnx.Rngs(0))
  return nnx.to_pure_dict(nnx.state(model))


def test_batches_are_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  assert sharding.batch_shards(mesh) == 4
  rows = np.arange(16, dtype=np.int32).reshape(8, 2)
  found = sharding.put_batch({'inputs': rows}, mesh)['inputs']
  assert found.sharding.spec == P(('data', 'fsdp'))
  assert {s.data.shape for s in found.addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(found, rows)
