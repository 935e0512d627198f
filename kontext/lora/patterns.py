"""Regular expressions on dotted module names. A pattern must match the whole name."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from kontext.errors import UserError


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """Raises UserError for a pattern that is no regular expression."""
    return [_compile(pattern) for pattern in patterns]


def matches_any(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def left_by(exclude: Sequence[str], include: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that `exclude` does not match, and those that `include` brings back."""
    excluding, including = compile_patterns(exclude), compile_patterns(include)
    return [n for n in names if matches_any(including, n) or not matches_any(excluding, n)]


def idle_patterns(
    names: Collection[str], include: Sequence[str], exclude: Sequence[str], *, always: Sequence[str]
) -> Iterator[str]:
    """A sentence for each pattern that changes nothing of which of `names` are trained.

    Include patterns bring back what `always` or `exclude` leaves out; without either they choose alone.
    """
    excluding = compile_patterns((*always, *exclude))
    for argument, patterns in (("exclude_patterns", exclude), ("include_patterns", include)):
        for pattern in compile_patterns(patterns):
            matched = [name for name in names if pattern.fullmatch(name)]
            if not matched:
                yield (
                    f"{argument}: {pattern.pattern!r} matches nothing. Patterns must match a whole name such as "
                    "double_blocks.0.img_attn.qkv."
                )
            elif patterns is include and excluding and not any(matches_any(excluding, n) for n in matched):
                yield (
                    f"include_patterns: what {pattern.pattern!r} matches is trained anyway, for include patterns bring back "
                    "what is excluded. To train nothing else, give exclude_patterns=.* too."
                )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"The pattern {pattern!r} is not a regular expression: {error}.") from error
