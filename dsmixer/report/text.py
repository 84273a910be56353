"""Values as text for people."""

from __future__ import annotations

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
