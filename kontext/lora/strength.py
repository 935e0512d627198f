"""How strongly a LoRA acts: as a whole, and block by block."""

import math
import re
from dataclasses import dataclass

from kontext.errors import UserError

_RULE = re.compile(r"(double|single)(?:(\d+)(?:-(\d+))?)?=(.+)")
_MODULE = re.compile(r"(double|single)_blocks\.(\d+)\..*")

Block = tuple[str, int]
"""Kind (double or single) and number."""


@dataclass(frozen=True)
class Rule:
    """A factor for the blocks of one kind, from `first` to `last`; None is the end."""

    kind: str
    first: int
    last: int | None
    factor: float

    def holds(self, block: Block) -> bool:
        kind, number = block
        return kind == self.kind and self.first <= number and (self.last is None or number <= self.last)

    def __str__(self) -> str:
        blocks = "" if (self.first, self.last) == (0, None) else f"{self.first}-{self.last}"
        if self.first == self.last:
            blocks = str(self.first)
        return f"{self.kind}{blocks}={_text(self.factor)}"


@dataclass(frozen=True)
class Strength:
    """`overall`, times the factor of the last rule that holds for a block. What is in no block has `overall`."""

    overall: float = 1.0
    rules: tuple[Rule, ...] = ()

    def of(self, module: str) -> float:
        """The strength in a module, by its BFL name."""
        return self.at(block_of(module))

    def at(self, block: Block | None) -> float:
        factors = [rule.factor for rule in self.rules if block is not None and rule.holds(block)]
        return self.overall * factors[-1] if factors else self.overall

    def __str__(self) -> str:
        """As `parse_strength` reads it."""
        overall = _text(self.overall)
        return f"{overall}:{','.join(map(str, self.rules))}" if self.rules else overall


Multiplier = float | str | Strength
"""What may be given for a strength: a number, its text, or the thing itself."""


def as_strength(value: Multiplier) -> Strength:
    """Raises UserError for a text that is none."""
    if isinstance(value, Strength):
        return value
    try:
        return parse_strength(str(value))
    except ValueError:
        raise UserError(
            f"--lora-multiplier: '{value}' is no strength. Write a number, or a number and factors of blocks, such as "
            "1.0:double=0.5,single3-10=0.8."
        ) from None


def parse_strength(text: str) -> Strength:
    """`0.8`, or `1.0:double=0.5,single3-10=0.8,single12=0`. Raises ValueError for anything else."""
    overall, colon, rules = text.strip().partition(":")
    parts = rules.split(",") if colon else []
    return Strength(_number(overall), tuple(_rule(part.strip()) for part in parts))


def block_of(module: str) -> Block | None:
    """The block that a module is in, by its BFL name."""
    match = _MODULE.fullmatch(module)
    return (match[1], int(match[2])) if match else None


def _rule(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    kind, first, last, factor = match.groups()
    if first is None:
        return Rule(kind, 0, None, _number(factor))
    rule = Rule(kind, int(first), int(last or first), _number(factor))
    if rule.first > int(last or first):
        raise ValueError(text)
    return rule


def _text(number: float) -> str:
    return repr(number).removesuffix(".0")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
