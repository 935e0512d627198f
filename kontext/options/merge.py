"""Options of `kontext merge`."""

from kontext.options.shared import Common


class Merge(Common):
    """Merge LoRAs into a checkpoint."""
