"""Where data comes from and what is done to it before a model sees it."""

from collections.abc import Iterator
from dataclasses import dataclass

from psa_jax.config import paths
from psa_jax.config.fields import (
  COUNT,
  OPTIONAL,
  PROBABILITY,
  UNIT,
  Section,
  choice,
  number,
  runtime,
)

_MIN_BPE = 257


@dataclass(frozen=True)
class SyntheticConfig(Section):
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

  vocab_size: int = number(256, COUNT)
  needles: tuple[int, ...] = number((4,), COUNT)
  value_len: int = number(5, COUNT)
  hops: int = number(2, OPTIONAL)
  depth_min: float = number(0.0, UNIT)
  depth_max: float = number(1.0, UNIT)
  noise: bool = True

  def check(self, path: str) -> Iterator[str]:
    """There is something to be found, and depths are in order."""
    if not self.needles:
      yield f'{path}needles is empty'
    if self.depth_min > self.depth_max:
      yield (
        f'{path}depth_min is {self.depth_min}, above depth_max, which is '
        f'{self.depth_max}'
      )


@dataclass(frozen=True)
class AugmentConfig(Section):
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
  ops: int = number(0, OPTIONAL)
  magnitude: float = number(9.0, '[0, 10]')
  mixup: float = number(0.0, OPTIONAL)
  cutmix: float = number(0.0, OPTIONAL)

  @property
  def on_host(self) -> bool:
    """Whether a picture is changed before it is put on the device."""
    return self.crop != 'none' or self.flip or self.ops > 0


@dataclass(frozen=True)
class DataConfig(Section):
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
  shift: int = number(0, OPTIONAL)
  augment: AugmentConfig = AugmentConfig()
  word_dropout: float = number(0.0, PROBABILITY)
  threads: int = number(0, '[0, 256]', runtime=True)
  synthetic: SyntheticConfig = SyntheticConfig()

  def check(self, path: str) -> Iterator[str]:
    """What holds whatever the model and the task are."""
    if not self.text_key:
      yield f'{path}text_key is empty'
    # What follows a source's colon may be a path; nothing else begins with ~.
    places = {
      'source': self.source.partition(':')[2],
      'data_dir': self.data_dir,
    }
    for key, place in places.items():
      if problem := paths.unusable(place, f'{path}{key}'):
        yield problem
    kind, _, size = self.tokenizer.partition(':')
    bpe = kind == 'bpe' and size.isdecimal() and int(size) >= _MIN_BPE
    if self.tokenizer != 'bytes' and not bpe:
      yield (
        f'{path}tokenizer is {self.tokenizer!r}, but it must be bytes or '
        f'bpe:<vocabulary size of at least {_MIN_BPE}>'
      )
