"""Text of a model as people may see it, in a terminal or on a page.

- `visible`: of one token, with its white space made visible
- `harmless`: of an answer or a prompt, as it is
- `shade`: on a background that tells compute
- `width`: columns that a text takes; `fitted`: a text in as many columns as are wanted
- `Waiting`: one line about what is waited for, gone when it is over
"""

import shutil
import unicodedata
from typing import TextIO

_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that a terminal obeys, or cannot write."""
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u206a\u206b\u206c\u206d\u206e\u206f"
"""Embeddings, overrides and isolates of direction, which rearrange what stands around them."""
_BYTE_ORDER_MARK = "\ufeff"
_SHADES = (236, 23, 29, 36, 43)  # terminal colours, dark to bright


def visible(text: str) -> str:
    """Text of a token with its white space made visible, and nothing that a terminal would obey.

    What has no width by itself (a joiner, for example) is shown as its number where it stands alone.
    """
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    shown = (letter.isprintable() or (len(text) > 1 and _is_harmless(letter)) for letter in text)
    return "".join(letter if show else f"\\x{ord(letter):02x}" for letter, show in zip(text, shown, strict=True))


def harmless(text: str) -> str:
    """Text without what a terminal would obey: escapes and other controls, and overrides of the writing direction.

    Joiners stay, without which Persian, Hindi and composed emoji fall apart, and so do spaces of all widths.
    """
    return "".join(letter if letter in "\n\t" or _is_harmless(letter) else "\ufffd" for letter in text)


def _is_harmless(letter: str) -> bool:
    return unicodedata.category(letter) not in _CONTROLS and letter not in _DIRECTIONS and letter != _BYTE_ORDER_MARK


def shade(text: str, share: float, colour: bool) -> str:
    """`text` on a background that is the brighter the larger `share`, 0 to 1."""
    text = harmless(text)
    if not colour:
        return text
    number = min(len(_SHADES) - 1, int(share * len(_SHADES)))
    return "\n".join(f"\x1b[48;5;{_SHADES[number]};38;5;231m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def width(text: str) -> int:
    """Columns of a terminal that a text without control characters takes: two for wide characters, none for marks."""
    marks = ("Mn", "Me", "Cf")
    letters = (letter for letter in text if unicodedata.category(letter) not in marks)
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in letters)


def fitted(text: str, columns: int) -> str:
    """`text` filled with spaces to so many `columns`; what is longer loses its end, and an ellipsis tells so."""
    if width(text) > columns:
        while width(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))


class Waiting:
    """Says on one line of a terminal what is waited for, and takes it back; silent where `stream` is no terminal."""

    def __init__(self, stream: TextIO):
        self.stream, self.shown = stream, False

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def say(self, words: str) -> None:
        """Show `words` in place of those before."""
        if self.stream.isatty():
            words = fitted(words, shutil.get_terminal_size().columns - 1).rstrip()
            self.stream.write(f"\r\x1b[K\x1b[2m{words}\x1b[0m")
            self.stream.flush()
            self.shown = True

    def end(self) -> None:
        """Erase the line."""
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.shown = False
