"""Regular expressions on dotted module names. A pattern must match the whole name."""

import re
from collections.abc import Iterable, Sequence

from kontext.errors import UserError


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """Raises UserError for a pattern that is no regular expression."""
    return [_compile(pattern) for pattern in patterns]


def matches_any(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"The pattern {pattern!r} is not a regular expression: {error}.") from error
