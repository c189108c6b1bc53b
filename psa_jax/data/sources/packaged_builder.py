"""The TFDS builder of text that needs no download: files of a package.

Prepares and reads without TensorFlow as long as the file format is
array_record. Importing this module imports tensorflow_datasets (half a
second); `packaged` does so only when a set has to be prepared.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


class PackagedDocuments(
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Documents in the order of their names; every tenth is for validation."""

  VERSION = tfds.core.Version('1.0.0')
  FILES: Sequence[tuple[str, Path]] = ()

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
    train = [file for i, file in enumerate(self.FILES) if i % 10]
    return {
      'train': self._generate_examples(train),
      'validation': self._generate_examples(self.FILES[::10]),
    }

  def _generate_examples(self, files):
    for i, (name, path) in enumerate(files):
      yield i, {'name': name, 'text': path.read_bytes()}


def make(
  name: str, files: Sequence[tuple[str, Path]], description: str, folder: Path
) -> Any:
  """The builder of one set.

  Args:
    name: of the set.
    files: (name, path) of every document, sorted by name.
    description: one line for TFDS's own record.
    folder: where TFDS puts it.
  """
  # TFDS takes the name of a set from its class.
  kind = type(
    name.capitalize(),
    (PackagedDocuments,),
    {'name': name, 'FILES': files, '__doc__': description},
    skip_registration=True,
  )
  return kind(data_dir=folder, file_format='array_record')
