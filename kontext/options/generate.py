"""Options of `kontext generate`."""

from kontext.options.shared import Common


class Generate(Common):
    """Edit or make a picture."""
