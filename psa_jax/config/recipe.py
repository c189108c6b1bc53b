"""Recipe files: `file.py[:arg]` plus overrides becomes a `Config`.

A resolved configuration, `config.json` of a run, is a recipe too. Else a recipe
is a Python file with `get_config(arg='')` that returns a `ConfigDict`
of what differs from the defaults; a dict `ARGS` in it names the arguments that
it takes, a dict `OPTIONS` what may follow them after a comma. Whatever goes
wrong in it is one line, `ConfigError`. Sweeps are not done here.
"""

import inspect
import pathlib
import traceback
import types
from collections.abc import Iterable, Mapping
from typing import Any

from psa_jax import extras
from psa_jax.config import json_text, paths
from psa_jax.config.errors import ConfigError, cut, nearest
from psa_jax.config.run import Config
from psa_jax.config.tree import from_config_dict, with_task

try:
  from ml_collections import ConfigDict
except ImportError:
  extras.require('train', 'a recipe')
  raise


def load_recipe(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> Config:
  """Loads `file.py[:arg]` and lays the overrides on what it returns.

  Args:
    spec: path of the recipe, and the argument of its `get_config`.
    overrides: (dotted path, text of the value), the last of equal paths wins.

  Returns:
    The validated configuration.

  Raises:
    ConfigError: the file, its argument, a key or a value is wrong.
  """
  file, _, arg = spec.partition(':')
  if not file:
    raise ConfigError(
      f'--config={cut(spec)} names no file; for example --config=configs/lm_64k'
      '.py:quick'
    )
  file = paths.expanded(file, '--config')
  if file.endswith('.json'):
    return from_config_dict(_read_json(file, arg), overrides)
  values = _call_get_config(file, _execute(file), arg)
  return from_config_dict(values, overrides)


def default_workdir(spec: str) -> pathlib.Path:
  """`runs/<recipe>[_<arg>]`: the same command finds its run again.

  A `config.json` lies in the directory that it belongs to.
  """
  file, _, arg = spec.partition(':')
  if file.endswith('.json'):
    return pathlib.Path(file).parent
  name = f'{pathlib.Path(file).stem}_{arg}' if arg else pathlib.Path(file).stem
  return pathlib.Path('runs') / name.replace('/', '_').replace(',', '_')


def _read_json(file: str, arg: str) -> dict[str, Any]:
  """A resolved configuration."""
  if arg:
    raise ConfigError(
      f'{file} is a resolved configuration and takes no argument :{arg}'
    )
  try:
    values = json_text.unsealed(json_text.read(file), required=False)
  except FileNotFoundError:
    raise ConfigError(f'there is no configuration {file}') from None
  except (OSError, ValueError) as e:
    raise ConfigError(
      f'cannot read the configuration {cut(file)}: {_reason(e)}'
    ) from e
  return with_task(values)


def _execute(file: str) -> types.ModuleType:
  """Runs a recipe file; no byte code is cached, so an edit always counts."""
  path = pathlib.Path(file)
  try:
    source = path.read_text(encoding='utf-8')
  except FileNotFoundError:
    raise ConfigError(_missing(path)) from None
  except IsADirectoryError:
    raise ConfigError(
      f'{file} is a folder; name a recipe in it{_suggestion(path)}'
    ) from None
  except (OSError, ValueError) as e:  # no UTF-8, or a NUL in the name
    raise ConfigError(
      f'cannot read the recipe {cut(file)}: {_reason(e)}; a recipe is a Python '
      'file with a function get_config(arg)'
    ) from e
  module = types.ModuleType(path.stem)
  module.__file__ = file
  try:
    exec(compile(source, file, 'exec'), module.__dict__)
  except (Exception, SystemExit) as e:
    raise _failed(file, e) from e
  return module


def _missing(path: pathlib.Path) -> str:
  folder = path.parent if path.parent.is_dir() else pathlib.Path('configs')
  return f'there is no recipe {path}{_suggestion(folder, str(path))}'


def _suggestion(folder: pathlib.Path, wanted: str = '') -> str:
  """The recipe in a folder that is most like a name."""
  files = [str(p) for p in folder.glob('*.py')]
  return f'; did you mean {nearest(wanted, files)}?' if files else ''


def _reason(error: Exception) -> str:
  if isinstance(error, UnicodeDecodeError):
    return 'it is no text'
  return getattr(error, 'strerror', None) or str(error)


def _call_get_config(file: str, module: types.ModuleType, arg: str) -> Any:
  get_config = getattr(module, 'get_config', None)
  if not callable(get_config):
    raise ConfigError(
      f'the recipe {file} has no function get_config(arg), which returns what '
      'differs from the defaults'
    )
  known = getattr(module, 'ARGS', None)
  options = getattr(module, 'OPTIONS', {})
  first, comma, option = arg.partition(',')
  if known is not None and (first if options else arg) not in known:
    raise ConfigError(_bad_arg(file, arg, list(known)))
  if options and comma and option not in options:
    near = nearest(option, options)
    raise ConfigError(
      f'the recipe {file} has no {option!r} after :{first}, did you mean '
      f':{first},{near}? options: {", ".join(options)}'
    )
  words = (arg,) if arg else ()
  try:
    inspect.signature(get_config).bind(*words)
  except TypeError as e:
    raise ConfigError(f'get_config of {file}: {e}') from e
  try:
    values = get_config(*words)
  except (Exception, SystemExit) as e:
    raise _failed(file, e) from e
  if not isinstance(values, ConfigDict | Mapping):
    raise ConfigError(
      f'get_config of {file} returned {type(values).__name__}; '
      'it should return an ml_collections.ConfigDict'
    )
  return values


def _bad_arg(file: str, arg: str, known: list[str]) -> str:
  arg = cut(arg)
  listed = ', '.join(f':{k}' if k else '(none)' for k in known)
  if not arg:
    return f'the recipe {file} needs an argument, {file}:arg; it takes {listed}'
  names = [k for k in known if k]
  hint = f'; did you mean :{nearest(arg, names)}?' if names else ';'
  return f'the recipe {file} has no argument :{arg}{hint} it takes {listed}'


def _failed(file: str, error: BaseException) -> ConfigError:
  """An exception raised inside a recipe as one line that names the place."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if f.filename == file]
  if isinstance(error, SyntaxError) and error.filename == file:
    lines.append(error.lineno)
  place = f'{file} line {lines[-1]}' if lines else file
  text = error.msg if isinstance(error, SyntaxError) else str(error)
  return ConfigError(f'{place}: {type(error).__name__}: {text}')
