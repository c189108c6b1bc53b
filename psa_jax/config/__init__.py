"""The configuration: frozen dataclasses that refuse impossible values.

A recipe in `configs/` returns an `ml_collections.ConfigDict` that names only
what differs from the defaults. `from_config_dict` turns it into the frozen tree
that the library takes; an unknown key, a wrong type or an impossible value
raises `ConfigError` with one line that names the way out. The same sections,
made by hand, refuse the same values.

The settings of a mechanism stand beside the mechanism, in `psa_jax/attention`.
"""

from psa_jax.config.attention import AttentionConfig as AttentionConfig
from psa_jax.config.attention import MechanismConfig as MechanismConfig
from psa_jax.config.attention import SoftmaxConfig as SoftmaxConfig
from psa_jax.config.data import AugmentConfig as AugmentConfig
from psa_jax.config.data import DataConfig as DataConfig
from psa_jax.config.data import SyntheticConfig as SyntheticConfig
from psa_jax.config.errors import ConfigError as ConfigError
from psa_jax.config.errors import RunError as RunError
from psa_jax.config.errors import nearest as nearest
from psa_jax.config.fields import ScheduleConfig as ScheduleConfig
from psa_jax.config.fields import Section as Section
from psa_jax.config.model import ImageConfig as ImageConfig
from psa_jax.config.model import ModelConfig as ModelConfig
from psa_jax.config.model import NormConfig as NormConfig
from psa_jax.config.model import QuantConfig as QuantConfig
from psa_jax.config.run import Config as Config
from psa_jax.config.train import CheckpointConfig as CheckpointConfig
from psa_jax.config.train import ControllerConfig as ControllerConfig
from psa_jax.config.train import EvalConfig as EvalConfig
from psa_jax.config.train import LogConfig as LogConfig
from psa_jax.config.train import MeshConfig as MeshConfig
from psa_jax.config.train import OptimConfig as OptimConfig
from psa_jax.config.train import TrainConfig as TrainConfig
from psa_jax.config.tree import Changes as Changes
from psa_jax.config.tree import Leaf as Leaf
from psa_jax.config.tree import apply_overrides as apply_overrides
from psa_jax.config.tree import diff as diff
from psa_jax.config.tree import find_leaf as find_leaf
from psa_jax.config.tree import flatten as flatten
from psa_jax.config.tree import from_config_dict as from_config_dict
from psa_jax.config.tree import leaves as leaves
from psa_jax.config.tree import to_dict as to_dict
from psa_jax.config.tree import with_task as with_task
