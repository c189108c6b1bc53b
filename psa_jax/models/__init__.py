"""Models by name."""

from flax import nnx

from psa_jax.config import ConfigError, ModelConfig
from psa_jax.models.decoder_lm import DecoderLM as DecoderLM
from psa_jax.models.encoder import Encoder as Encoder
from psa_jax.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from psa_jax.models.transformer import ModelOut as ModelOut
from psa_jax.models.vit import ViT as ViT

MODELS = {
  'decoder_lm': DecoderLM,
  'encoder': Encoder,
  'vit': ViT,
  'encoder_decoder': EncoderDecoder,
}


def build(
  config: ModelConfig, vocab_size: int, *, classes: int = 0, rngs: nnx.Rngs
) -> nnx.Module:
  """Creates the model that `config.kind` names.

  Works under `jax.eval_shape` and `jax.jit`; return the split state, never
  the module. `psa_jax.sharding.PARAMETERS` names the axes of its matrices.

  Args:
    config: the model.
    vocab_size: V of the tokenizer, which `config.vocab_size` overrides, or the
      number of classes that a vision Transformer tells apart.
    classes: outputs of an encoder's head; 0 leaves the head out.
    rngs: the stream `params` draws the initial values.

  Raises:
    ConfigError: an unknown kind or sizes that do not fit each other.
  """
  if config.kind not in MODELS:
    raise ConfigError(
      f'unknown model.kind {config.kind!r}; one of {", ".join(MODELS)}'
    )
  options = {'classes': classes} if classes else {}
  return MODELS[config.kind](config, vocab_size, **options, rngs=rngs)
