"""`synthetic:<task>`: recall tasks made on the fly (`data/synthetic`)."""

from collections.abc import Iterator

from psa_jax.config import DataConfig
from psa_jax.data import synthetic
from psa_jax.data.sources.registry import QUESTIONS, Source, register


def check(config: DataConfig) -> Iterator[str]:
  """What the settings of the task cannot be."""
  task, settings = config.source.partition(':')[2], config.synthetic
  if task not in synthetic.TASKS:
    yield (
      f'config.data.source is {config.source!r}, but the task must be one of '
      f'{", ".join(synthetic.TASKS)}'
    )
  if config.threads:
    yield (
      f'config.data.threads is {config.threads}, but one thread makes up the '
      'rows of synthetic tasks; set it to 0'
    )
  if not settings.needles:
    yield 'config.data.synthetic.needles is empty'
  if settings.depth_min > settings.depth_max:
    yield (
      f'config.data.synthetic.depth_min is {settings.depth_min}, above '
      f'depth_max, which is {settings.depth_max}'
    )


register(
  Source('synthetic:<task>', yields={QUESTIONS: synthetic.load}, check=check)
)
