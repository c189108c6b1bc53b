"""Text on disk to batches of token windows; importing this is cheap.

`lm.build_corpus` is the way in; `pipeline.train_iterator` and
`pipeline.eval_batches` come after it. TFDS, grain and tokenizers are imported
by the function that first needs them.
"""

from psa_jax import extras

extras.require('data')
