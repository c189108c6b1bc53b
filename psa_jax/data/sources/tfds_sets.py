"""Sets that TFDS knows: finding, preparing and opening one by its name.

The name is `set`, `set/config`, either with `:version`. Folders are searched in
`data.data_dir` first, then where TFDS itself puts them. Reading needs no
TensorFlow where the set was prepared as array_record. Nothing is downloaded
but by `prepare`: `python -m psa_jax.data.prepare --name=<name>`.

Some sets (pg19, lm1b, ...) use TensorFlow in their own code; `prepare` then
says how to prepare them once where TensorFlow is installed.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.config import (
  ConfigError,
  DataConfig,
  RunError,
  json_text,
  paths,
)
from psa_jax.data import cache

_NAME = re.compile(r'[A-Za-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?')
# TFDS registers these groups only on import, and importing them all needs
# TensorFlow; one module at a time does not.
_FEATURES_FILE = 'features.json'
# Keys in it whose value names a class; without a dot it names no module.
_CLASS_KEYS = {'pythonClassName', 'python_class_name', 'type'}
_FEATURES = 'tensorflow_datasets.'
_GROUPS = ('text', 'translate', 'summarization', 'question_answering')


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
    folder = root / re.split('[/:]', name)[0]
    for depth in ('*', '*/*'):
      for path in folder.glob(f'{depth}/{_FEATURES_FILE}'):
        check_features(path.parent)
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


def check_features(folder: Path) -> None:
  """Refuses a prepared set whose files name features that TFDS does not have.

  TFDS imports the module of every class that `features.json` names, so a data
  set would choose which code runs.

  Raises:
    ConfigError: a class of another package, or no readable JSON.
  """
  path = folder / _FEATURES_FILE
  if not path.exists():
    return
  try:
    todo = [json_text.read(path)]
  except (OSError, ValueError) as e:
    raise ConfigError(
      f'{path} cannot be read: {e}; delete {folder} and prepare it again'
    ) from e
  while todo:
    value = todo.pop()
    if isinstance(value, list):
      todo += value
    elif isinstance(value, dict):
      todo += value.values()
      for key in _CLASS_KEYS & value.keys():
        text = value[key]
        named = isinstance(text, str) and '.' in text
        if named and not text.startswith(_FEATURES):
          raise ConfigError(
            f'{path} names the feature {text!r}, which is none of TFDS and is '
            f'not imported; delete {folder} and prepare it again'
          )


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
  usual = os.environ.get('TFDS_DATA_DIR')
  if usual:
    return [data_dir, Path(paths.expanded(usual, '$TFDS_DATA_DIR'))]
  # The other folder that TFDS would use; without a home there is none.
  usual = '~/tensorflow_datasets'
  if paths.unusable(usual, ''):
    return [data_dir]
  return [data_dir, Path(paths.expanded(usual, ''))]


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
      hint = 'move it away and prepare it again'
    else:
      places = ' or '.join(map(str, _roots(cache.data_dir(config))))
      reason, hint = f'is not prepared in {places}', 'prepare it once'
    option = f' --data_dir={config.data_dir}' if config.data_dir else ''
    raise ConfigError(
      f'tfds:{name} {reason}; {hint}: python -m psa_jax.data.prepare '
      f'--name={name}{option}'
    ) from e


def prepare(name: str, config: DataConfig) -> str:
  """Downloads a set and writes it as array_record; returns what it holds.

  Raises:
    ConfigError: no set of that name.
    RunError: it cannot be downloaded or written, or needs TensorFlow.
  """
  root = cache.data_dir(config)
  builder = find_builder(name, root)
  if not Path(builder.data_path).exists():
    _download(name, builder, root)
  return _describe(name, builder)


def _download(name: str, builder: Any, root: Path) -> None:
  import tensorflow_datasets as tfds

  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS's own advice
      # What TFDS knows no hash of is not downloaded.
      checked = tfds.download.DownloadConfig(force_checksums_validation=True)
      builder.download_and_prepare(
        file_format='array_record', download_config=checked
      )
  except Exception as e:  # the set's own code: anything
    if misses_tensorflow(e):
      raise RunError(tensorflow_once(name, root)) from e
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise RunError(
      f'tfds:{name} could not be prepared in {root}: {reason}'
    ) from e


def _describe(name: str, builder: Any) -> str:
  counts = [f'{k} {v.num_examples}' for k, v in builder.info.splits.items()]
  features = builder.info.features.items()
  keys = sorted(k for k, feature in features if is_text(feature))
  key = 'text' if 'text' in keys else '|'.join(keys)
  return (
    f'{name} {builder.version} in {builder.data_path}: {", ".join(counts)}\n'
    f'use: --config.data.source=tfds:{name} --config.data.text_key={key}'
  )
