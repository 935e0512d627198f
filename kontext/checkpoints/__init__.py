"""Models from files: every published layout, told apart by its tensors, read one tensor at a time."""

from kontext.checkpoints.autoencoder import empty_autoencoder, load_autoencoder
from kontext.checkpoints.reading import tell_of_fp8
from kontext.checkpoints.source import Source, open_source
from kontext.checkpoints.text import empty_clip, empty_t5, load_clip, load_t5
from kontext.checkpoints.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from kontext.checkpoints.transformer import empty_transformer, load_transformer, transformer_config

__all__ = [
    "Source",
    "empty_autoencoder",
    "empty_clip",
    "empty_t5",
    "empty_transformer",
    "load_autoencoder",
    "load_clip",
    "load_clip_tokenizer",
    "load_t5",
    "load_t5_tokenizer",
    "load_transformer",
    "open_source",
    "tell_of_fp8",
    "transformer_config",
]
