"""A corpus of packed tokens and the windows a language model reads.

A split is one array: each document after a separator (id 0), one separator at
the end. The separator opens its document and is also what ends the one
before, so the last token of a document predicts "it ends here", which depends
on that document alone. For this reason no target needs weight 0 where
attention is cut between documents.

Windows do not overlap: window i predicts tokens i*T + 1 to (i + 1)*T.

Packing is done once and kept in the data cache, in a folder named by the
content of the text and the tokenizer; tokens are read by memory map.
"""

import functools
import hashlib
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int64, Integer

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import baselines, documents, folder, text, tokenizer

_LAYOUT = 'packed-1'  # change it with the meaning of the files below
_SPLITS = documents.Splits._fields


@dataclass(frozen=True)
class Packed:
  """One split as tokens.

  Attributes:
    tokens: ids, of the smallest unsigned type that holds the vocabulary.
    doc_starts: ascending places of the separators that open a document.
    split: `train` or `validation`.
  """

  tokens: Integer[np.ndarray, 'tokens']
  doc_starts: Int64[np.ndarray, 'documents']
  split: str


@dataclass(frozen=True)
class Corpus:
  """Everything a run needs to know about its text.

  Attributes:
    manifest: source, package, version, hashes and counts; plain JSON values.
    unigram_bpb, bigram_bpb: bits per byte of the baselines on validation.
  """

  train: Packed
  validation: Packed
  tokenizer: tokenizer.Tokenizer
  manifest: dict
  unigram_bpb: float
  bigram_bpb: float


class Windows:
  """Random access to the windows of a split; see `windows`."""

  def __init__(self, packed: Packed, seq_len: int, cut_documents: bool):
    self._packed = packed
    self._seq_len = seq_len
    self._cut_documents = cut_documents
    full, rest = divmod(len(packed.tokens) - 1, seq_len)
    keep_rest = packed.split != 'train' and rest > 0
    self._len = full + keep_rest

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i) -> dict[str, np.ndarray]:
    if not 0 <= i < self._len:
      raise IndexError(f'window {i} of {self._len}')
    begin, seq_len = int(i) * self._seq_len, self._seq_len
    tokens = np.zeros(seq_len + 1, np.int32)  # zeros pad the last window
    taken = self._packed.tokens[begin : begin + seq_len + 1]
    tokens[: len(taken)] = taken
    segment_ids, positions = self._segments(begin)
    real = np.arange(seq_len) < len(taken) - 1
    return {
      'inputs': np.where(real, tokens[:-1], 0),
      'targets': np.where(real, tokens[1:], 0),
      'segment_ids': np.where(real, segment_ids, 0),
      'positions': np.where(real, positions, 0),
      'weights': real.astype(np.float32),
    }

  def _segments(self, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """Which document each token belongs to, and its place therein."""
    places = np.arange(self._seq_len, dtype=np.int32)
    starts = np.zeros(self._seq_len, np.int32)
    if self._cut_documents:
      all_starts, end = self._packed.doc_starts, begin + self._seq_len
      first, last = np.searchsorted(all_starts, [begin + 1, end])
      starts[all_starts[first:last] - begin] = 1
    segment_ids = 1 + np.cumsum(starts, dtype=np.int32)
    return segment_ids, places - np.maximum.accumulate(places * starts)


def windows(packed: Packed, *, seq_len: int, cut_documents: bool) -> Windows:
  """Cuts a split into windows of `seq_len` targets.

  Train drops the tokens after the last full window. Validation keeps them in
  a last window padded with weight 0, so every token of it is judged once.

  Args:
    packed: the split.
    seq_len: T.
    cut_documents: number the documents of a window 1, 2, ... in `segment_ids`
      and restart `positions` in each; otherwise the window is one segment
      with positions 0 to T - 1.

  Returns:
    A sequence of dict(inputs, targets, segment_ids, positions: int32 [T],
    weights: f32 [T]). Padding has segment 0, position 0 and weight 0.

  Raises:
    ConfigError: the train split is shorter than a window and one target.
  """
  if seq_len < 1:
    raise ConfigError(f'a window of {seq_len} tokens; use at least 1')
  if packed.split == 'train' and len(packed.tokens) <= seq_len:
    raise ConfigError(
      f'a window of {seq_len} tokens needs {seq_len + 1}, but the train split '
      f'has {len(packed.tokens)} in {len(packed.doc_starts)} documents; use a '
      'shorter train.seq_len or more text'
    )
  return Windows(packed, seq_len, cut_documents)


def build_corpus(config: DataConfig) -> Corpus:
  """Reads, tokenizes and packs the text that `config` names, or finds it done.

  Raises:
    ConfigError: the text is missing, empty or unreadable.
    RunError: the data cache cannot be written.
  """
  tokenizer.bpe_size(config.tokenizer)  # refuse a bad name before any work
  source = text.load_documents(config)
  key = f'{_LAYOUT} {source.key} {config.tokenizer}'
  short = re.sub(r'\W+', '-', f'{config.source}-{config.tokenizer}')[-60:]
  name = f'{short}-{hashlib.sha256(key.encode()).hexdigest()[:16]}'
  return folder.cached(
    folder.data_dir(config) / 'corpora' / name,
    build=functools.partial(_write, source, config),
    load=functools.partial(_load, source.manifest),
  )


def _write(source: documents.TextSource, config: DataConfig, path: Path):
  """Fills a corpus folder."""
  logging.info('Packing %s', config.source)
  measures = [documents.measure(split) for split in source.splits]
  _check_measures(source, measures)
  nul = any(measure.nul for measure in measures)
  encoder = tokenizer.make_tokenizer(config, source.train, nul=nul)
  files, described = {}, {'name': encoder.name}
  if isinstance(encoder, tokenizer.BpeTokenizer):
    encoder.save(path / 'tokenizer.json')
    saved = (path / 'tokenizer.json').read_bytes()
    files['tokenizer.json'] = zlib.crc32(saved)
    described['sha256'] = hashlib.sha256(saved).hexdigest()
  dtype = np.min_scalar_type(encoder.vocab_size - 1)
  facts = {}
  for name, split, measure in zip(
    _SPLITS, source.splits, measures, strict=True
  ):
    tokens = _pack(encoder.encode_all(split), path / name, dtype, files)
    facts[name] = {
      'documents': measure.documents,
      'bytes': measure.bytes,
      'tokens': tokens,
      'sha256': measure.sha256,
    }
  manifest = {
    'sha256': documents.combined_sha256(*(m.sha256 for m in measures)),
    'splits': facts,
    'tokenizer': {**described, 'vocab_size': encoder.vocab_size},
    **_baselines(source.splits, nul),
  }
  description = {
    'manifest': manifest,
    'nul': nul,
    'dtype': dtype.name,
    'crc32': files,
  }
  (path / 'corpus.json').write_text(json.dumps(description, indent=2))


def _check_measures(source, measures) -> None:
  for split, measure in zip(_SPLITS, measures, strict=True):
    if not measure.bytes:
      raise ConfigError(
        f'data.source {source.manifest["source"]!r}: the {split} split holds '
        f'no text ({measure.documents} documents); choose or add text'
      )
  content = documents.combined_sha256(*(m.sha256 for m in measures))
  if content != source.manifest.get('sha256', content):
    raise RunError(
      f'{source.manifest["source"]} changed while it was read; run again'
    )


def _pack(
  encoded: Iterable[np.ndarray],
  stem: Path,
  dtype: np.dtype,
  files: dict[str, int],
) -> int:
  """Writes `<stem>.tokens` and `<stem>.starts`; returns the token count."""
  separator = np.array([tokenizer.SEPARATOR], dtype)
  starts, size, check = [], 0, 0
  with open(stem.with_suffix('.tokens'), 'wb') as f:

    def append(ids: np.ndarray) -> int:
      data = ids.tobytes()
      f.write(data)
      return zlib.crc32(data, check)

    for ids in encoded:
      starts.append(size)
      check = append(np.concatenate([separator, ids.astype(dtype)]))
      size += 1 + len(ids)
    check = append(separator)
  data = np.array(starts, np.int64).tobytes()
  stem.with_suffix('.starts').write_bytes(data)
  files[f'{stem.name}.tokens'] = check
  files[f'{stem.name}.starts'] = zlib.crc32(data)
  return size + 1


def _baselines(splits: documents.Splits, nul: bool) -> dict[str, float]:
  encoder = tokenizer.ByteTokenizer(nul)
  counts = [baselines.pair_counts(split, encoder) for split in splits]
  return {
    'unigram_bits_per_byte': baselines.unigram_bits_per_byte(*counts),
    'bigram_bits_per_byte': baselines.bigram_bits_per_byte(*counts),
  }


def _load(source_manifest: dict, path: Path) -> Corpus:
  """Reads a corpus folder; every byte of it is checked."""
  try:
    description = json.loads((path / 'corpus.json').read_text())
    for name, check in description['crc32'].items():
      if zlib.crc32(_map(path / name, np.dtype(np.uint8)).data) != check:
        raise folder.Damaged(f'{name} is not what was written')
    manifest = {**source_manifest, **description['manifest']}
    dtype = np.dtype(description['dtype'])
    train, validation = (
      Packed(
        tokens=_map(path / f'{split}.tokens', dtype),
        doc_starts=_map(path / f'{split}.starts', np.dtype(np.int64)),
        split=split,
      )
      for split in _SPLITS
    )
    encoder = _load_tokenizer(path, description['nul'])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise folder.Damaged(str(e)) from e
  return Corpus(
    train=train,
    validation=validation,
    tokenizer=encoder,
    manifest=manifest,
    unigram_bpb=manifest['unigram_bits_per_byte'],
    bigram_bpb=manifest['bigram_bits_per_byte'],
  )


def _load_tokenizer(path: Path, nul: bool) -> tokenizer.Tokenizer:
  if (path / 'tokenizer.json').exists():
    return tokenizer.BpeTokenizer.load(path / 'tokenizer.json')
  return tokenizer.ByteTokenizer(nul)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
  return np.memmap(path, dtype, mode='r')
