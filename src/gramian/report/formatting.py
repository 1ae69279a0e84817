"""Numbers and names as text, the same in the terminal and on the page."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from numbers import Integral, Real

MISSING = "–"

# Unicode categories of control characters: a name from a checkpoint must not move a terminal's cursor, reverse a
# page's reading direction (category Cf has the bidirectional controls), or be impossible to encode.
_ACTING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(text: object) -> str:
    r"""Return the text with control, direction and surrogate characters escaped.

    >>> visible("a\x1b[2Jb"), visible("line\none\u202e")
    ('a\\x1b[2Jb', 'line\\none\\u202e')
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _ACTING else char
        for char in text
    )


def elide(text: str, width: int, mark: str = "…") -> str:
    """Shorten a text in its middle, keeping more of its end, where names usually differ.

    >>> elide("encoder.layers.17.self_attention.query", 20)
    'encoder…ention.query'
    """
    if len(text) <= width:
        return text
    if width <= len(mark):
        return mark[: max(width, 0)]
    tail = (width - len(mark) + 1) * 3 // 5
    head = width - len(mark) - tail
    return text[:head] + mark + (text[-tail:] if tail else "")


def elide_words(text: str, most: int) -> str:
    """Return the text, cut after a word where it is longer than `most` characters.

    >>> elide_words("one two three", 9), elide_words("one two", 9)
    ('one two …', 'one two')
    """
    return text if len(text) <= most else text[: most - 1].rpartition(" ")[0] + " …"


def first_clauses(text: str, most: int) -> str:
    """Return the text, or where it is longer than `most` characters, what of it is true alone, or shown to be cut.

    A clause may be left out, and a parenthesis; not one of several cases ("or", "and"), nor what a colon announces. Of
    cases that a semicolon lists, the first ones, and how many others there are.

    >>> first_clauses("undefined after a skip, where gradients by depth say what it would (Figure 2)", 40)
    'undefined after a skip'
    >>> first_clauses("it is used twice, or the next input (a skip) is not its own", 40)
    'it is used twice, or the next input (a …'
    >>> first_clauses("undefined: 4 beside a skip; 1 recurrent; 1 of a kind that is not known", 60)
    'undefined: 4 beside a skip; 1 recurrent; and 1 other reason'
    """
    if len(text) <= most:
        return text
    if ";" in text and "(" not in text:
        cases = text.split("; ")
        for num in range(len(cases) - 1, 0, -1):
            told = f"{'; '.join(cases[:num])}; and {plural(len(cases) - num, 'other reason')}"
            if len(told) <= most:
                return told
    ends = [m.start() for m in re.finditer(r", (?!(or|and|nor)\b)| \(", text) if m.start() <= most]
    clauses = text[: ends[-1]] if ends else ""
    if ";" in text or re.search(r", (or|and|nor)\b", text):
        clauses = ""
    is_whole = clauses and clauses.count("(") == clauses.count(")")
    return clauses if is_whole else elide_words(text, most)


def abbreviate(name: str, width: int) -> str:
    """Shorten a dotted name: parts become initials, from the left, until it fits; numbers are kept.

    >>> abbreviate("model.layers.17.self_attn.q_proj.weight", 26)
    'm.l.17.s.q_proj.weight'
    """
    parts = name.split(".")
    last = len(parts) - 1
    for place in [*range(last - 1), last, last - 1][-len(parts) :]:  # of the last two, "weight" says least
        if len(".".join(parts)) <= width:
            break
        if not parts[place][:1].isdigit():
            parts[place] = parts[place][:1]
    return ".".join(parts)


def distinct_parts(names: Sequence[str]) -> tuple[list[str], str]:
    """Return the dotted parts in which names differ, and the pattern that they share ("" if there is none).

    >>> distinct_parts(["encoder.0.query.weight", "encoder.1.query.weight"])
    (['0', '1'], 'encoder.*.query.weight')
    """
    parts = [name.split(".") for name in names]
    shortest = min((len(p) for p in parts), default=0)
    head = 0
    while head < shortest - 1 and len({p[head] for p in parts}) == 1:
        head += 1
    tail = 0
    while tail < shortest - 1 - head and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    if len(parts) < 2 or head + tail == 0:
        return list(names), ""
    differing = [".".join(p[head : len(p) - tail]) for p in parts]
    return differing, ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]])


def number(value: object) -> str:
    """Return a table cell as text: integers in full, other numbers with three significant digits, words unchanged.

    >>> [number(v) for v in (3_000_000, 0.81, 12.34, 123456.0, 1e-45, None, float("nan"))]
    ['3,000,000', '0.810', '12.3', '123,456', '1.0e-45', '–', 'nan']
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, Real):
        return visible(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    x = float(value)
    if not math.isfinite(x):
        return "nan" if math.isnan(x) else "inf" if x > 0 else "-inf"
    if x == 0:
        return "0"
    if 999.5 <= abs(x) < 1e6:
        return f"{x:,.0f}"
    if 9.995e-4 <= abs(x) < 999.5:
        return f"{x:#.3g}".rstrip(".")
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def plural(count: int, noun: str) -> str:
    """Return the count and its noun, in the plural where needed.

    >>> plural(1, "error"), plural(1200, "layer")
    ('1 error', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: int) -> str:
    """Return a power of ten as text: `power_of_ten(-3) == "10⁻³"`."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the labels of a linear axis's ticks, all with the same number of decimals.

    >>> tick_labels([0.0, 0.25, 0.5]), tick_labels([0, 1000, 2000]), tick_labels([0, 2e-7])
    (['0.00', '0.25', '0.50'], ['0', '1,000', '2,000'], ['0', '2e-7'])
    """
    largest = max((abs(v) for v in values), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return [_shortest(v) for v in values]
    for decimals in range(7):
        if all(abs(v - round(v, decimals)) <= 1e-9 * max(largest, 1e-9) for v in values):
            return [f"{v + 0.0:,.{decimals}f}" for v in values]
    return [f"{v:.4g}" for v in values]


def _shortest(value: float) -> str:
    text = f"{value:.6g}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.5e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text
