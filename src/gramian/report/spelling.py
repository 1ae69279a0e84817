"""Texts that any console can show: control characters escaped, and ASCII where it has no Unicode."""

from __future__ import annotations

import unicodedata

from rich.console import ConsoleOptions

from .formatting import visible

__all__ = ["Speller", "ascii_text"]

_SPELLED = str.maketrans(
    dict(
        pair.split("=", 1)
        for pair in (
            *("…=...", "×=x", "–=-", "—=-", "−=-", "→=->", "≥=>=", "≤=<=", "≈=~", "±=+/-", "√=sqrt", "‖=||", "·=*"),
            *("χ=chi", "σ=sigma", "ξ=xi", "λ=lambda", "κ=kappa", "η=eta", "Θ=Theta", "Δ=Delta", "Σ=sum ", "∇=grad "),
            *("‘='", "’='", '“="', '”="', "✓=ok", "✗=x"),
        )
    )
)


def ascii_text(text: str) -> str:
    r"""Spell a text in ASCII.

    >>> ascii_text("gain χ ≥ 1, 3×3, 10⁻³, naïve, 中")
    'gain chi >= 1, 3x3, 10-3, naive, \\u4e2d'
    """
    if text.isascii():
        return text
    letters = []
    for char in text.translate(_SPELLED):
        if not char.isascii():
            plain = unicodedata.normalize("NFKD", char).translate(_SPELLED).encode("ascii", "ignore").decode()
            char = plain or char.encode("unicode_escape").decode("ascii")
        letters.append(char)
    return "".join(letters)


class Speller:
    """Makes texts safe for the console: control characters escaped, and ASCII where it has no Unicode."""

    def __init__(self, options: ConsoleOptions) -> None:
        self.ascii = options.ascii_only

    def __call__(self, text: object) -> str:
        shown = visible(text)
        return ascii_text(shown) if self.ascii else shown

    def lines(self, text: str) -> str:
        return "\n".join(self(line) for line in text.split("\n"))
