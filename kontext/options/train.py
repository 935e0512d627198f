"""Options of `kontext train`."""

from kontext.options.shared import Common


class Train(Common):
    """Train a LoRA."""
