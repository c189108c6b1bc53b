"""All pages at once: `python -m experiments --regenerate`, or `make tables`.

Renews the tables and pictures of every experiment from its recorded rows.
Nothing is run; what is up to date stays as it is, byte by byte.
"""

import sys

from experiments.bench import experiment
from psa_jax import command_line
from psa_jax.config import ConfigError


def main(argv: list[str]) -> int:
  """Renews every page, or lists the experiments."""
  return command_line.run(lambda: _run(argv))


def _run(argv: list[str]) -> None:
  if argv not in ([], ['--regenerate']):
    raise ConfigError(
      f'python -m experiments: {" ".join(argv)} is not --regenerate, the only '
      f'flag; one experiment is python -m experiments.{experiment.NAMES[0]}'
    )
  for name in experiment.NAMES:
    one = experiment.find(name)
    if argv:
      one.write_pages()
    print(f'{name}: {"is renewed" if argv else one.about}', flush=True)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
