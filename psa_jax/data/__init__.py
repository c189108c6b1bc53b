"""Data on disk to batches of rows; importing this is cheap.

`sources` says where data comes from and loads it; `text`, `examples`, `images`
and `synthetic` turn it into rows; `pipeline` makes batches of them. TFDS, grain
and tokenizers are imported by the function that first needs them.
"""

from psa_jax import extras

extras.require('data')
