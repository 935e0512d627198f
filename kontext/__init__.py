"""kontext: fine-tune FLUX.1 Kontext and edit pictures with it."""

__version__ = "0.1.0"
