"""The settings of attention: one frozen dataclass a mechanism."""

from dataclasses import dataclass

from psa_jax.config_fields import ScheduleConfig, choice, runtime


@dataclass(frozen=True)
class DenseConfig:
  """Dense causal attention; nothing to set."""


@dataclass(frozen=True)
class _BlockLists:
  """What the mechanisms with a sink and a window have in common."""

  block_q: int = 128
  block_k: int = 64
  window: int = 512
  sink_blocks: int = 1

  @property
  def forced_blocks(self) -> int:
    """Most blocks that sink, window and own tile take, whatever the budget."""
    own = -(-self.block_q // self.block_k)
    window = -(-self.window // self.block_k)
    return self.sink_blocks + own + window + 1


@dataclass(frozen=True)
class PsaConfig(_BlockLists):
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

  budget: str = choice('ratio', 'ratio', 'mass')
  keep: ScheduleConfig = ScheduleConfig()
  mass: ScheduleConfig = ScheduleConfig()
  scoring: str = choice('mean', 'mean', 'bounds', 'random', 'recent')
  max_blocks: int = 0
  eval_keep: float = runtime(0.0)


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
class HybridConfig(_BlockLists):
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

  sink_blocks: int = 0
  keep: ScheduleConfig = ScheduleConfig(kind='linear', final=0.25)
  coefficient: float = 1.0
  min_blocks: int = 4
  scoring: str = choice('mean', 'mean', 'bounds')
  max_blocks: int = 0
  eval_keep: float = runtime(0.0)


@dataclass(frozen=True)
class DsaConfig(_BlockLists):
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
  budget: str = choice('tokens', 'tokens', 'ratio')
  top_k: ScheduleConfig = ScheduleConfig(init=2048.0)
  keep: ScheduleConfig = ScheduleConfig()
  pooling: str = choice('max', 'max', 'sum', 'mass')
  warmup_steps: int = 0
  eval_budget: float = runtime(0.0)


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
    importance: what tokens are judged by: `attention` that they got, or
      `random` numbers, others for every step and text, which is a control for
      models that are not causal. Heads are judged by what they add.
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
  importance: str = choice('attention', 'attention', 'random')
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
class SoftmaxConfig:
  """Which softmax block lists are read with (MECHANISMS section 9).

  Attributes:
    kind: `polynomial` takes the softmax of a cubic of the scores, `sas`
      replaces e^x by a table and a cubic and drops what is below e^-6.
    coefficients: a0 to a3 of the polynomial; (0, 1, 0, 0) changes nothing.
    clamp: scores are cut to [-clamp, clamp] before the polynomial; 0 is off.
    mix: schedule of the share of these coefficients, in [0, 1]; the rest is
      the plain softmax.
  """

  kind: str = choice('exact', 'exact', 'polynomial', 'sas')
  coefficients: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)
  clamp: float = 0.0
  mix: ScheduleConfig = ScheduleConfig()


# Mechanisms that read block lists with `AttentionConfig.softmax`.
APPROXIMATED = ('psa', 'hybrid')


@dataclass(frozen=True)
class AttentionConfig:
  """Which mechanism reads the keys; one sub-config per mechanism.

  Attributes:
    name: the mechanism.
    implementation: how its kernels run; `auto` takes the platform's best. One
      that the mechanism lacks or that cannot run is refused.
    check_lists: for debugging: a run stops at the first block list that names
      a block twice, or one that is not there. Slow.
    softmax: exact or approximate, for `psa` and `hybrid`.
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
  softmax: SoftmaxConfig = SoftmaxConfig()
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
