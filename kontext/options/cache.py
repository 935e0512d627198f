"""Options of `kontext cache-latents` and `kontext cache-text`."""

from kontext.options.shared import Common


class CacheLatents(Common):
    """Encode the pictures of a dataset."""


class CacheText(Common):
    """Encode the captions of a dataset."""
