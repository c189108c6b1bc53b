"""The optional parts of the package, and what is said where one is missing.

`pip install psa_jax` brings what `import psa_jax` needs; `psa_jax.train`,
`psa_jax.data` and `psa_jax.tasks` need the extra of their name.
"""

from importlib.util import find_spec

# Extra -> the modules that our files import of it. Their packages are the ones
# that pyproject.toml lists under that name.
MODULES = {
  'train': (
    'absl',
    'filelock',
    'matplotlib',
    'ml_collections',
    'orbax',
    'rich',
    'safetensors',
    'tensorboardX',
  ),
  'data': ('absl', 'grain', 'PIL', 'tensorflow_datasets', 'tokenizers'),
  'tasks': ('absl', 'sacrebleu', 'sklearn'),
}


def require(extra: str, wanted_by: str = '') -> None:
  """Refuses to go on without the packages of an extra.

  Args:
    extra: a key of `MODULES`.
    wanted_by: what needs it, for the message; psa_jax.<extra> if not given.

  Raises:
    ImportError: one line that names what is missing and the command.
  """
  missing = [name for name in MODULES[extra] if find_spec(name) is None]
  if missing:
    wanted_by = wanted_by or f'psa_jax.{extra}'
    raise ImportError(
      f"{wanted_by} needs {', '.join(missing)}: pip install 'psa_jax[{extra}]'"
    )
