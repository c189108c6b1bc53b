"""Text to a corpus of packed tokens (see `windows`), done once.

A corpus is kept in the data cache, in a folder named by the content of the
text and the tokenizer; tokens are read by memory map.
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

from psa_jax.config import ConfigError, DataConfig, RunError, json_text
from psa_jax.data import cache, sources
from psa_jax.data.text import baselines, documents, tokenizer
from psa_jax.data.text.windows import Packed

_LAYOUT = 'packed-2'  # change it with the meaning of the files below
_SPLITS = documents.Splits._fields


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


def build_corpus(config: DataConfig) -> Corpus:
  """Reads, tokenizes and packs the text that `config` names, or finds it done.

  Raises:
    ConfigError: the text is missing, empty or unreadable.
    RunError: the data cache cannot be written.
  """
  tokenizer.bpe_size(config.tokenizer)  # refuse a bad name before any work
  source = sources.load(config, sources.DOCUMENTS)
  key = f'{_LAYOUT} {source.key} {config.tokenizer}'
  # ASCII: the name of a folder is bounded in bytes.
  words = re.sub(r'\W+', '-', f'{config.source}-{config.tokenizer}', flags=re.A)
  short = words[-60:]
  name = f'{short}-{hashlib.sha256(key.encode()).hexdigest()[:16]}'
  return cache.cached(
    cache.data_dir(config) / 'corpora' / name,
    build=functools.partial(_write, source, config),
    load=functools.partial(_load, source.manifest),
  )


def _write(source: documents.TextSource, config: DataConfig, path: Path):
  """Fills a corpus cache."""
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
    'files': files,
  }
  sealed = json_text.sealed(description)
  (path / 'corpus.json').write_text(json.dumps(sealed, indent=2))


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
    description = json_text.unsealed(json_text.read(path / 'corpus.json'))
    for name, check in description['files'].items():
      if zlib.crc32(_map(path / name, np.dtype(np.uint8)).data) != check:
        raise cache.Damaged(f'{name} is not what was written')
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
    raise cache.Damaged(str(e)) from e
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
