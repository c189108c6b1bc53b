"""Where data comes from: `data.source` by name, a file a source.

The registry is in `registry.py`; each line of imports below adds a source to
it. Importing this is cheap: what is heavy is imported when a source is read.
"""

from psa_jax.data.sources import ddtp as ddtp
from psa_jax.data.sources import digits as digits
from psa_jax.data.sources import files as files
from psa_jax.data.sources import sotu as sotu
from psa_jax.data.sources import stdlib as stdlib
from psa_jax.data.sources import stdlib_tags as stdlib_tags
from psa_jax.data.sources import synthetic as synthetic
from psa_jax.data.sources import tfds as tfds
from psa_jax.data.sources import vader as vader
from psa_jax.data.sources import verses as verses
from psa_jax.data.sources.registry import DOCUMENTS as DOCUMENTS
from psa_jax.data.sources.registry import IMAGES as IMAGES
from psa_jax.data.sources.registry import LABELLED as LABELLED
from psa_jax.data.sources.registry import PAIRS as PAIRS
from psa_jax.data.sources.registry import QUESTIONS as QUESTIONS
from psa_jax.data.sources.registry import TAGGED as TAGGED
from psa_jax.data.sources.registry import Source as Source
from psa_jax.data.sources.registry import every as every
from psa_jax.data.sources.registry import find as find
from psa_jax.data.sources.registry import load as load
from psa_jax.data.sources.registry import names as names
from psa_jax.data.sources.registry import register as register
from psa_jax.data.sources.registry import unknown as unknown
