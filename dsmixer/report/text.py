"""Values as text for people."""

from __future__ import annotations

import unicodedata

MISSING = "—"


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def readable(value: object) -> str:
    """A number in four figures or with separators of thousands; a dash for None; else the text of it."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)


def harmless(text: str, keep: str = "\n\t") -> str:
    """Text that shows what it holds: control characters, marks of direction and what else has no look of its
    own are written as escapes, such as ``\\u202e``, except for ``keep`` and blanks of any width."""
    if text.isprintable():
        return text
    return "".join(
        sign
        if sign.isprintable() or sign in keep or unicodedata.category(sign) == "Zs"
        else sign.encode("unicode_escape").decode("ascii")
        for sign in text
    )


def amount(num_bytes: float) -> str:
    """Bytes as ``1.23 GB``, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def percent(share: float) -> str:
    """A share as ``81.7 %``; a dash where it is not a number."""
    return MISSING if share != share else f"{100 * share:.1f} %"
