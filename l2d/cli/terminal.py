"""Text of a model as people may see it, in a terminal or on a page.

- `visible`: of one token, with its white space made visible
- `harmless`: of an answer or a prompt, as it is
- `shade`: on a background that tells compute
"""

_SHADES = (236, 23, 29, 36, 43)  # terminal colours, dark to bright


def visible(text: str) -> str:
    """Text of a token with its white space made visible, and nothing that a terminal would obey."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def harmless(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def shade(text: str, share: float, colour: bool) -> str:
    """`text` on a background that is the brighter the larger `share`, 0 to 1."""
    text = harmless(text)
    if not colour:
        return text
    number = min(len(_SHADES) - 1, int(share * len(_SHADES)))
    return "\n".join(f"\x1b[48;5;{_SHADES[number]};38;5;231m{line}\x1b[0m" if line else "" for line in text.split("\n"))
