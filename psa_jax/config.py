"""Typed configuration: frozen dataclasses and the checks at their edge.

A recipe in `configs/` returns an `ml_collections.ConfigDict` that names only
what differs from the defaults below. `config_dict.py` turns it into the frozen
tree that the library takes; an unknown key, a wrong type or an impossible
value (`validate.py`) raises `ConfigError` with one line that names the mend.

The settings of attention are in `config_attention.py`; everything is imported
from here.
"""

from dataclasses import dataclass

from psa_jax.config_attention import APPROXIMATED as APPROXIMATED
from psa_jax.config_attention import BUDGETED as BUDGETED
from psa_jax.config_attention import AttentionConfig as AttentionConfig
from psa_jax.config_attention import CascadeConfig as CascadeConfig
from psa_jax.config_attention import DenseConfig as DenseConfig
from psa_jax.config_attention import DsaConfig as DsaConfig
from psa_jax.config_attention import HybridConfig as HybridConfig
from psa_jax.config_attention import NsaConfig as NsaConfig
from psa_jax.config_attention import OnDemandConfig as OnDemandConfig
from psa_jax.config_attention import PsaConfig as PsaConfig
from psa_jax.config_attention import SlaConfig as SlaConfig
from psa_jax.config_attention import SoftmaxConfig as SoftmaxConfig
from psa_jax.config_attention import TopkConfig as TopkConfig
from psa_jax.config_fields import ConfigError as ConfigError
from psa_jax.config_fields import RunError as RunError
from psa_jax.config_fields import ScheduleConfig as ScheduleConfig
from psa_jax.config_fields import choice, runtime


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
class AugmentConfig:
  """What training does to pictures (`psa_jax/data/images`).

  Attributes:
    crop: what part of a picture is seen; `resized` takes pictures of any size.
    flip: left for right, every other time.
    ops, magnitude: RandAugment: operations a picture (0 is off), and how strong
      they are, of 10.
    mixup, cutmix: alpha of mixing pictures in pairs; 0 is off.
  """

  crop: str = choice('none', 'none', 'pad', 'resized')
  flip: bool = False
  ops: int = 0
  magnitude: float = 9.0
  mixup: float = 0.0
  cutmix: float = 0.0

  @property
  def on_host(self) -> bool:
    """Whether a picture is changed before it is put on the device."""
    return self.crop != 'none' or self.flip or self.ops > 0


@dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how windows are cut from it, or pictures.

  Attributes:
    source: where the data comes from, a file of `psa_jax/data/sources`, for
      example `sotu` or `files:<glob>`; it has to yield what the task reads.
    data_dir: folder of prepared data sets; empty means
      `$PSA_JAX_DATA_DIR`, else `~/.cache/psa_jax`.
    text_key: feature that holds the text of a `tfds:` record,
    label_key: its label, or the tags of its words,
    words_key: its words, which are tagged then,
    source_key, target_key: its text and the translation.
    tokenizer: `bytes`, or `bpe:<vocabulary size>` trained on the train split.
    cut_documents: no attention across document boundaries.
    shift: pictures are moved by up to so many pixels in training.
    augment: what else is done to them.
    word_dropout: share of the tokens that an encoder does not see in training.
    threads: how many read (and augment) batches, a whole one each, ahead of the
      training step, and the rows of a batch in evaluation; 0 reads when a batch
      is asked for. The batches are the same.
    synthetic: settings of `synthetic:<task>`.
  """

  source: str = 'sotu'
  data_dir: str = runtime('')
  text_key: str = 'text'
  label_key: str = 'label'
  words_key: str = ''
  source_key: str = 'source'
  target_key: str = 'target'
  tokenizer: str = 'bytes'
  cut_documents: bool = False
  shift: int = 0
  augment: AugmentConfig = AugmentConfig()
  word_dropout: float = 0.0
  threads: int = runtime(0)
  synthetic: SyntheticConfig = SyntheticConfig()


@dataclass(frozen=True)
class NormConfig:
  """Which normalisation, and how PRepBN moves (MECHANISMS section 2).

  Attributes:
    kind: which normalisation every layer uses; `none` is for models whose
      norms are folded into their weights, and no model learns with it.
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
    'rmsnorm', 'rmsnorm', 'layernorm', 'batchnorm', 'repbn', 'prepbn', 'none'
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
class ImageConfig:
  """What a picture is to a vision Transformer.

  Attributes:
    size: rows and columns of pixels.
    channels: numbers a pixel.
    patch: rows and columns of a token; divides `size`.
  """

  size: int = 28
  channels: int = 1
  patch: int = 4


@dataclass(frozen=True)
class ModelConfig:
  """A Transformer.

  Attributes:
    kind: architecture: a causal language model, a bidirectional encoder, a
      vision Transformer, or both of the first two for translation, with
      `num_layers` each.
    image: of `vit`.
    vocab_size: 0 means the tokenizer's.
    biases: linear layers add a bias.
    tie_embeddings: a language model's output matrix is its embedding.
    mlp: `swiglu` (gated), or `gelu`, the two layers of a vision Transformer.
    head_dim: width of one head; 0 means d_model // num_heads.
    dropout, drop_path: rates of what training leaves out (`models/drop.py`).
    remat: `none`; `full` recomputes everything in the backward pass;
      `attention` keeps attention's outputs and recomputes the rest.
    compute_dtype: dtype of matrix products; softmax, norms and
      accumulations stay f32.
  """

  kind: str = choice(
    'decoder_lm', 'decoder_lm', 'encoder', 'vit', 'encoder_decoder'
  )
  num_layers: int = 2
  d_model: int = 128
  num_heads: int = 2
  num_kv_heads: int = 1
  head_dim: int = 0
  mlp_dim: int = 384
  vocab_size: int = 0
  dropout: float = 0.0
  drop_path: float = 0.0
  biases: bool = False
  tie_embeddings: bool = True
  mlp: str = choice('swiglu', 'swiglu', 'gelu')
  rope_theta: float = 500_000.0
  image: ImageConfig = ImageConfig()
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
  (dense), whose parameters are then new. `label_smoothing` is the share of a
  label, or of a token of a translation, that is spread over all others.
  """

  steps: tuple[int, ...] = runtime((100,))
  seq_len: tuple[int, ...] = (1024,)
  batch_size: tuple[int, ...] = (8,)
  loss_chunk: int = 8192
  controller: ControllerConfig = ControllerConfig()
  init_from: str = ''
  label_smoothing: float = 0.0


@dataclass(frozen=True)
class EvalConfig:
  """Validation: every `every` steps (0: only at the end), `windows` windows.

  `dense` adds a final evaluation with dense attention. The context length is
  the last stage's unless `seq_len` is set. `split` is what is judged; a
  language model's text has no `test`. Translations are made with `beam`
  hypotheses (1 is greedy), whose log-probability is divided by length **
  `length_penalty`.
  `reestimate` is over how many training batches `--mode=eval` and
  `--mode=export` estimate the statistics of batch norms anew; 0 keeps them.
  """

  every: int = runtime(0)
  windows: int = runtime(4)
  seq_len: int = runtime(0)
  dense: bool = runtime(True)
  split: str = runtime('validation', 'validation', 'test')
  reestimate: int = runtime(0)
  beam: int = runtime(4)
  length_penalty: float = runtime(1.0)


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
  """The whole run.

  Attributes:
    task: what is learned, a file of `psa_jax/tasks`; `tasks.check` refuses a
      `model.kind` or a `data.source` that does not go with it.
  """

  name: str = 'lm'
  seed: int = 0
  task: str = 'language_modeling'
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  log: LogConfig = LogConfig()
