"""Any text set that TFDS knows and somebody has prepared: `tfds:<name>`.

Reading needs no TensorFlow where the set was prepared as array_record. The
name is `set`, `set/config`, either with `:version`. Folders are searched in
`data.data_dir` first, then where TFDS itself puts them. Nothing is downloaded
here: `python -m psa_jax.data.prepare --name=<name>` does that.

Validation is the set's validation split, else its test split, else every
tenth record of train; the manifest says which.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from psa_jax.config import ConfigError, DataConfig, RunError
from psa_jax.data import documents, folder

_NAME = re.compile(r'[A-Za-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?')
# TFDS registers these groups only on import, and importing them all needs
# TensorFlow; one module at a time does not.
_GROUPS = ('text', 'translate', 'summarization', 'question_answering')


class Records(Sequence[bytes]):
  """The text of each record of one split, read on demand."""

  def __init__(self, records: Any, *, text_key: str, name: str, path: str):
    self._records = records
    self._text_key = text_key
    self._name = name
    self._path = path

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i) -> bytes:
    try:
      value = self._records[i][self._text_key]
    except RuntimeError as e:  # one of the ways array_record shows damage
      raise self._damaged(i, str(e).partition(';')[0]) from e
    if value is None:  # the other
      raise self._damaged(i, f'no {self._text_key!r} in it')
    return _as_bytes(value)

  def __iter__(self) -> Iterator[bytes]:
    return (self[i] for i in range(len(self)))

  def _damaged(self, i: int, reason: str) -> RunError:
    return RunError(
      f'tfds:{self._name}: record {i} cannot be read ({reason}); delete '
      f'{self._path} and prepare it again'
    )


def _as_bytes(value: Any) -> bytes:
  """Real records hold `bytes`, mocked ones `str`, tensors either."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.item()
  return value.encode() if isinstance(value, str) else value


def source(name: str, config: DataConfig) -> documents.TextSource:
  """A prepared TFDS set as documents.

  Raises:
    ConfigError: no such set, not prepared, or without such a feature.
  """
  builder = find_builder(name, folder.data_dir(config))
  # A set that was never prepared knows no splits; opening one tells.
  known = list(builder.info.splits) or ['train', 'validation']
  if 'train' not in known:
    raise ConfigError(
      f'tfds:{name} has no train split, only {", ".join(known)}; choose '
      'another data.source'
    )

  def records(split):
    path = str(builder.data_path)
    data = open_split(name, builder, split, config)
    _check_text_key(name, builder, config.text_key)
    return Records(data, text_key=config.text_key, name=name, path=path)

  train = records('train')
  held_out = next((s for s in ('validation', 'test') if s in known), None)
  if held_out:
    splits = documents.Splits(train, records(held_out))
  else:
    logging.info('tfds:%s: holding out every tenth record of train', name)
    splits = documents.every_tenth(train)
  manifest = {
    'source': f'tfds:{name}',
    'package': builder.name,
    'version': str(builder.version),
    'builder_config': builder.builder_config and builder.builder_config.name,
    'text_key': config.text_key,
    'held_out': f'split {held_out}' if held_out else 'every tenth of train',
    'documents': len(splits.train) + len(splits.validation),
  }
  return documents.TextSource(
    manifest, _identity(manifest, Path(builder.data_path)), lambda: splits
  )


def find_builder(name: str, data_dir: Path) -> Any:
  """The TFDS builder of a set: from its files if prepared, else its code.

  Raises:
    ConfigError: TFDS knows no such set, or not this config or version of it.
  """
  if not _NAME.fullmatch(name):  # 'huggingface:x' would go to the network
    raise ConfigError(
      f'data.source tfds:{name}: a name is set, set/config or set:1.0.0'
    )
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  for root in _roots(data_dir):
    try:
      return read_only_builder.builder_from_files(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
      pass
  _import_legacy(re.split('[/:]', name)[0])
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS's own advice
      return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as e:
    raise ConfigError(
      f'data.source tfds:{name}: neither TFDS {tfds.__version__} nor the '
      f'folder {data_dir} has a set of that name'
    ) from e
  except Exception as e:  # TFDS raises many kinds for a config or version
    if misses_tensorflow(e):
      raise RunError(tensorflow_once(name, data_dir)) from e
    reason = ' '.join(str(e).split())
    reason = re.sub(r'^Failed to construct .*?}": ', '', reason)[:300]
    raise ConfigError(f'data.source tfds:{name}: {reason}') from e


def misses_tensorflow(error: BaseException | None) -> bool:
  """Whether the cause of `error` is that TensorFlow is not installed."""
  while error:
    if isinstance(error, ImportError) and error.name == 'tensorflow':
      return True
    error = error.__cause__ or error.__context__
  return False


def tensorflow_once(name: str, data_dir: Path) -> str:
  """What to do about a set whose own code calls TensorFlow."""
  return (
    f'tfds:{name}: the code that prepares this set needs TensorFlow, once, in '
    'any environment: pip install tensorflow-cpu tensorflow-datasets; python '
    f'-c "import tensorflow_datasets as t; t.builder({name!r}, '
    f'data_dir={str(data_dir)!r}).download_and_prepare('
    "file_format='array_record')\"; reading it afterwards needs none"
  )


def _roots(data_dir: Path) -> list[Path]:
  usual = os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  return [data_dir, Path(usual).expanduser()]


def _import_legacy(name: str) -> None:
  """Registers a set whose module TFDS does not find by itself."""
  for group in _GROUPS:
    for stem in (name, name.removesuffix('_translate')):
      for module in (stem, f'{stem}.{stem}'):
        path = f'tensorflow_datasets.{group}.{module}'
        try:
          if importlib.util.find_spec(path):
            importlib.import_module(path)
        except ImportError:
          pass  # not a package, or its code needs TensorFlow


def _check_text_key(name: str, builder: Any, text_key: str) -> None:
  features = builder.info.features
  texts = sorted(k for k, feature in features.items() if is_text(feature))
  if not texts:
    raise ConfigError(f'tfds:{name} has no text, only {", ".join(features)}')
  if text_key not in texts:
    what = 'text feature' if text_key in features else 'feature'
    raise ConfigError(
      f'tfds:{name} has no {what} {text_key!r}; set data.text_key to '
      f'{" or ".join(texts)}'
    )


def is_text(feature: Any) -> bool:
  """Whether a TFDS feature is one string."""
  kind = getattr(feature, 'np_dtype', None)
  return not feature.shape and kind in (np.str_, np.object_, str, object)


def open_split(name: str, builder: Any, split: str, config: DataConfig) -> Any:
  """Random access to the records of a split.

  Raises:
    ConfigError: it is not prepared, or not as array_record.
  """
  try:
    return builder.as_data_source(split)
  except Exception as e:
    path = Path(builder.data_path)
    if path.exists():
      reason = f'is in {path}, but not as readable array_record files'
      mend = 'move it away and prepare it again'
    else:
      places = ' or '.join(map(str, _roots(folder.data_dir(config))))
      reason, mend = f'is not prepared in {places}', 'prepare it once'
    option = f' --data_dir={config.data_dir}' if config.data_dir else ''
    raise ConfigError(
      f'tfds:{name} {reason}; {mend}: python -m psa_jax.data.prepare '
      f'--name={name}{option}'
    ) from e


def _identity(manifest: dict, path: Path) -> str:
  """Changes when the prepared files do; hashing them would take minutes."""
  stats = [(p.name, p.stat()) for p in sorted(path.glob('*'))]
  files = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
  return hashlib.sha256(repr((manifest, files)).encode()).hexdigest()
