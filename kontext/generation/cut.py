"""What of a prompt a text encoder does not read."""

from typing import Any

from kontext.console import notice


def cut_part(tokenizer: Any, text: str, length: int) -> str:
    """The end of `text` that does not fit into `length` tokens, of which the last is the end-of-text token."""
    ids = tokenizer(text, verbose=False).input_ids
    return (
        tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True).strip() if len(ids) > length else ""
    )


def say_cut(name: str, tokenizer: Any, text: str, length: int, advice: str) -> None:
    """A notice with the part of `text` that the encoder `name` leaves out, if any."""
    if cut := cut_part(tokenizer, text, length):
        notice(f'{name} reads {length} tokens and leaves out "{cut}"{advice}')
