"""Trains or evaluates the model that a recipe describes.

  python launch.py --config=configs/lm_64k.py
  python launch.py --config=configs/lm_64k.py:quick --workdir=runs/try
  python launch.py --config=configs/lm_64k.py --config.train.steps=300,80,100
  python launch.py --config=configs/lm_64k.py:quick --print_config
  python launch.py --config=configs/lm_64k.py --mode=eval
  python launch.py --config=configs/vit_mnist.py --mode=export
  python launch.py --config=runs/vit_mnist/export/config.json --mode=eval

The same command again goes on where the run in its work directory stopped.
Exit codes: 0 done, or stopped by a signal and saved; 1 the run failed; 2 the
command was refused and nothing ran.
"""

import json
import os
import re
import sys
from collections.abc import Sequence

from absl import flags, logging

from psa_jax import command_line, compile_cache
from psa_jax import config as config_lib
from psa_jax.config import ConfigError, RunError, paths, recipe
from psa_jax.config.errors import StalledError, cut, line
from psa_jax.train import workdir

_FLAGS = (
  flags.DEFINE_string(
    'config',
    None,
    'Recipe, file.py[:arg] or a config.json; --config.a.b=v overrides a key.',
  ),
  flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default runs/<recipe>[_<arg>].'
  ),
  flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'eval', 'export'],
    'train; eval of the last checkpoint or of an exported model; export of the '
    'last checkpoint, its norms folded into its weights.',
  ),
  flags.DEFINE_bool(
    'print_config', False, 'Print the resolved configuration and stop.'
  ),
  flags.DEFINE_bool(
    'allow_config_change',
    False,
    'Resume although the configuration or the data is not the one the run '
    'began with.',
  ),
  flags.DEFINE_integer(
    'resume_from',
    None,
    'Go back to the checkpoint of this step, 0 to the beginning; later ones '
    'and the metrics are kept under other names.',
    lower_bound=0,
  ),
  flags.DEFINE_bool(
    'compile_cache',
    True,
    'Keep compiled programs for the next run, up to 2 GiB, in '
    "$PSA_JAX_CACHE_DIR or the user's cache folder; --nocompile_cache does "
    'not. JAX_COMPILATION_CACHE_DIR, if set, takes precedence.',
  ),
)
_CONFIG, _WORKDIR, _MODE, _PRINT_CONFIG, _ALLOW_CONFIG_CHANGE = _FLAGS[:-2]
_RESUME_FROM, _COMPILE_CACHE = _FLAGS[-2:]
_HELP = ('-h', '-help', '--help', '--helpshort', '--helpfull')
_OVERRIDE = re.compile(r'--?(no)?config\.([^=]*)(?:=(.*))?', re.DOTALL)


def main(argv: Sequence[str]) -> int:
  """Runs one command line; returns the exit code."""
  return command_line.run(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
  if any(word in _HELP for word in argv[1:]):
    print(_help())
    return 0
  overrides = _parse(argv)
  if not _CONFIG.value:
    raise ConfigError(
      'no recipe; pass --config=file.py[:arg], '
      'for example --config=configs/lm_64k.py'
    )
  config = recipe.load_recipe(_CONFIG.value, overrides)
  if _PRINT_CONFIG.value:
    print(json.dumps(config_lib.to_dict(config), indent=2))
    return 0
  directory = paths.expanded(
    _WORKDIR.value or recipe.default_workdir(_CONFIG.value), '--workdir'
  )
  allow = _ALLOW_CONFIG_CHANGE.value
  reading = _MODE.value != 'train'
  if _COMPILE_CACHE.value:
    compile_cache.turn_on()
  if reading and _RESUME_FROM.value is not None:
    raise ConfigError('--resume_from is for --mode=train; leave it out')
  workdir.check(
    directory, config, allow_config_change=allow, must_exist=reading
  )
  # Checkpoints and data readers take seconds to import; what is refused above
  # does not wait for them.
  from psa_jax import tasks

  tasks.check(config)
  from psa_jax.train import loop

  try:
    if _MODE.value == 'eval':
      loop.evaluate_checkpoint(config, directory)
    elif _MODE.value == 'export':
      loop.export_checkpoint(config, directory)
    else:
      loop.train_and_evaluate(
        config,
        directory,
        allow_config_change=allow,
        resume_from=_RESUME_FROM.value,
      )
  except StalledError as e:
    # At its end Python would wait for the threads that wait for the disk.
    print(f'error: {line(e)}', file=sys.stderr, flush=True)
    os._exit(1)
  except SystemExit as e:  # with code 0 too, nothing was finished
    raise RunError(f'something in the run called sys.exit({e.code!r})') from e
  return 0


def _parse(argv: Sequence[str]) -> list[tuple[str, str]]:
  """Parses the flags; returns the overrides as (dotted path, text)."""
  try:
    words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=True)
    words, overrides = split_overrides(words)
    rest = flags.FLAGS([argv[0], *words])[1:]
  except flags.UnrecognizedFlagError as e:
    raise _unknown_flag(e.flagname) from e
  except RecursionError as e:  # absl's search for a flag of a similar name
    raise _unknown_flag(max(argv[1:], key=len).lstrip('-')) from e
  except UnicodeDecodeError as e:
    raise ConfigError(
      f'a --flagfile is not UTF-8 text ({e.reason}); it holds one flag a line'
    ) from e
  except flags.Error as e:
    raise ConfigError(str(e).removeprefix('ERROR:: ')) from e
  if rest:
    word = cut(rest[0])
    hint = f'--config={word}' if '.py' in word else '--flag=value'
    raise ConfigError(f'unexpected argument {word!r}; did you mean {hint}?')
  logging.use_absl_handler()
  return overrides


def _unknown_flag(name: str) -> ConfigError:
  near = config_lib.nearest(name, [f.name for f in _FLAGS])
  return ConfigError(
    f'unknown flag --{cut(name)}; did you mean --{near}? see --help'
  )


def split_overrides(
  argv: Sequence[str],
) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--config.a.b=v`, `--config.a.b v` and `--[no]config.a.b` out.

  Returns:
    What is left of `argv`, and (dotted path, text) in the order given.

  Raises:
    ConfigError: an unknown key, no value, or `--no` for a key that is no bool.
  """
  words_left, overrides = [], []
  words = iter(argv)
  for word in words:
    match = _OVERRIDE.fullmatch(word)
    if not match:
      words_left.append(word)
      continue
    negated, path, text = match.groups()
    is_bool = config_lib.find_leaf(path).type is bool
    if negated and (text is not None or not is_bool):
      raise ConfigError(
        f'--noconfig.{path}: --no is for a bool without a value; '
        f'use --config.{path}=value'
      )
    if text is None and is_bool:
      text = 'false' if negated else 'true'
    elif text is None:
      text = next(words, None)
    if text is None:
      raise ConfigError(f'--config.{path} needs a value: --config.{path}=value')
    overrides.append((path, text))
  return words_left, overrides


def _help() -> str:
  lines = [(__doc__ or '').strip(), '', 'Flags:']
  lines += [f'  --{f.name}: {flags.FLAGS[f.name].help}' for f in _FLAGS]
  lines += ['', 'Keys of the configuration and their defaults:']
  for leaf in config_lib.leaves().values():
    value = str(leaf.default).replace(' ', '')
    options = f'   ({" | ".join(leaf.options)})' if leaf.options else ''
    lines.append(f'  --config.{leaf.path}={value}{options}')
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
