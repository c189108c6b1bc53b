"""All pages at once: `python -m experiments --regenerate`, or `make tables`.

Renews the tables and pictures of every experiment from its recorded rows.
Nothing is run; what is up to date stays as it is, byte by byte.
"""

import sys

from experiments.bench import experiment


def main(argv: list[str]) -> int:
  """Renews every page, or lists the experiments."""
  if argv not in ([], ['--regenerate']):
    print(
      f'python -m experiments: {" ".join(argv)} is not --regenerate, the only '
      'flag',
      file=sys.stderr,
    )
    return 2
  for name in experiment.NAMES:
    one = experiment.find(name)
    if argv:
      one.write_pages()
    print(f'{name}: {"is renewed" if argv else one.about}', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
