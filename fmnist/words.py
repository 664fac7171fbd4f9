"""How texts that others wrote, such as the names of a store's runs, reach a terminal: without characters that it would obey."""

import builtins
import warnings
from typing import TextIO

OBEYED = (
    *range(0x20),
    *range(0x7F, 0xA0),
    *range(0x2028, 0x202F),  # line ends and directions of writing
    *range(0x2066, 0x206A),
)
ESCAPES = {code: f"\\u{code:04x}" for code in OBEYED if chr(code) not in "\n\t"}


def printable(text: object) -> str:
    """The text with what a terminal would obey escaped as JSON does it; lines and tabs stay."""
    return str(text).translate(ESCAPES)


def print_plain(text: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text as `printable` has it."""
    builtins.print(printable(text), file=file, flush=flush)


def warn_plainly() -> None:
    """Have Python's warnings, which may quote any text, printed as `printable` has it."""
    as_it_is = warnings.formatwarning
    warnings.formatwarning = lambda *given: printable(as_it_is(*given))
