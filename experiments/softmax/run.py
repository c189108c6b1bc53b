"""Errors of the SAS softmax over the length of a row.

  python experiments/softmax/run.py          half a minute

Rows of Gaussian scores with standard deviation sigma meet Gaussian values. The
kernel's own functions are compared in f32 with the exact softmax in NumPy
float64: no kernel is timed. Rows of the table are appended to `results.jsonl`,
and the table in `README.md` is made from what this run found.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

_WRITE = flags.DEFINE_bool('write', True, 'Append results and update README.')
_QUERIES = flags.DEFINE_integer(
  'queries', 64, 'Rows of each kind.', lower_bound=1
)

LENGTHS = (256, 1024, 4096, 8192, 16_384, 65_536)
SIGMAS = (1, 2, 3, 4)
WIDTH = 64  # of the values
SOURCES = ['psa_jax/kernels', ':(glob)experiments/softmax/*.py']


def main(argv):
  """Measures every length and sigma, and writes the table."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  from psa_jax import report

  stamp = report.provenance(ROOT, SOURCES)
  rows = [
    {'length': length, 'sigma': sigma, **measure(length, sigma), **stamp}
    for sigma in SIGMAS
    for length in LENGTHS
  ]
  text = report.markdown(table(rows))
  print(text)
  if not _WRITE.value:
    return
  with (HERE / 'results.jsonl').open('a') as file:
    file.writelines(json.dumps(row) + '\n' for row in rows)
  versions = ', '.join(f'{key} {value}' for key, value in stamp.items())
  report.replace_section(HERE / 'README.md', 'sas', f'{text}\n\n{versions}')


def measure(length: int, sigma: int) -> dict[str, float]:
  """Means over the rows of one kind; errors are relative L2 norms."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from psa_jax.kernels import softmax

  rng = np.random.default_rng(length + sigma)
  s = sigma * rng.normal(size=(_QUERIES.value, length))
  values = rng.normal(size=(length, WIDTH))
  d_out = rng.normal(size=(_QUERIES.value, WIDTH))

  def output(w):
    return w @ values / w.sum(1, keepdims=True)

  def score_gradients(w, slope):
    dp = d_out @ values.T
    return slope * (dp - (w * dp).sum(1, keepdims=True))

  def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)

  x = s - s.max(1, keepdims=True)
  exact = np.exp(x)
  in_f32 = jnp.asarray(x, jnp.float32)
  w, slope = (
    np.asarray(jax.jit(function)(in_f32), np.float64)
    for function in (softmax.sas, softmax.sas_slope)
  )
  total, exact_total = (y.sum(1, keepdims=True) for y in (w, exact))
  cut = np.where(x < softmax.SAS_LEAST, exact, 0).sum(1) / exact_total[:, 0]
  uncut = np.where(x < softmax.SAS_LEAST, 0, exact)
  p, q = exact / exact_total, w / total
  return {
    'dropped': float(cut.mean()),
    'probabilities': float(np.abs(q - p).sum(1).mean()),
    'output': float(relative(output(w), output(exact))),
    'output_without_cut': float(relative(output(w), output(uncut))),
    'gradient': float(
      relative(score_gradients(q, slope / total), score_gradients(p, p))
    ),
  }


def table(rows):
  """The rows as text."""
  head = ['sigma', 'keys a row', 'mass dropped', 'sum of absolute errors of p']
  head += ['output error', 'of it the cubic', 'score gradient error']
  names = 'dropped', 'probabilities', 'output', 'output_without_cut', 'gradient'
  lines = [
    [str(r['sigma']), f'{r["length"]:,}', *(f'{r[n]:.2%}' for n in names)]
    for r in rows
  ]
  return [head, *lines]


if __name__ == '__main__':
  app.run(main)
