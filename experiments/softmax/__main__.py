"""Errors of the SAS softmax over the length of a row.

  python -m experiments.softmax      half a minute

Rows of Gaussian scores with standard deviation sigma meet Gaussian values. The
kernel's own functions are compared in f32 with the exact softmax in NumPy
float64: no kernel is timed.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import cli, tables
from experiments.bench.experiment import Experiment
from experiments.bench.settings import Settings, option
from psa_jax import report
from psa_jax.kernels import softmax

SIGMAS = (1, 2, 3, 4)
WIDTH = 64  # of the values
ERRORS = {
  'dropped': 'mass dropped',
  'probabilities': 'sum of absolute errors of p',
  'output': 'output error',
  'output_without_cut': 'of it the cubic',
  'gradient': 'score gradient error',
}


@dataclasses.dataclass(frozen=True)
class SoftmaxSettings(Settings):
  """What `--set` changes."""

  lengths: tuple[int, ...] = option(
    (256, 1024, 4096, 8192, 16_384, 65_536), 'Keys of a row.', least=1
  )
  queries: int = option(64, 'Rows of each kind.', least=1)


def run(settings, book):
  """A row for each sigma and length."""
  for sigma in SIGMAS:
    for length in settings.lengths:
      about = {'length': length, 'sigma': sigma}
      if not book.has(**about):
        book.add(about | measure(length, sigma, settings.queries))


def measure(length: int, sigma: int, queries: int) -> dict[str, float]:
  """Means over the rows of one kind; errors are relative L2 norms."""
  rng = np.random.default_rng(length + sigma)
  s = sigma * rng.normal(size=(queries, length))
  values = rng.normal(size=(length, WIDTH))
  d_out = rng.normal(size=(queries, WIDTH))

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


def sections(rows):
  """The table of the page."""
  lines = [
    (str(row['sigma']), f'{row["length"]:,}')
    + tuple(f'{row[name]:.2%}' for name in ERRORS)
    for row in rows
  ]
  header = ('sigma', 'keys a row', *ERRORS.values())
  text = report.markdown([header, *lines])
  return {'sas': tables.paragraphs(text, tables.caption(rows))}


EXPERIMENT = Experiment(
  name='softmax',
  about='what the SAS softmax loses over the length of a row',
  settings=SoftmaxSettings(),
  quick=SoftmaxSettings(lengths=(256, 1024), queries=8),
  run=run,
  sections=sections,
  key=('sigma', 'length'),
)

if __name__ == '__main__':
  sys.exit(cli.main(EXPERIMENT))
