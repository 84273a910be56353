"""What a check has found: a status, what was seen, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]
ORDER: tuple[Status, ...] = ("ok", "warning", "problem")
"""From the best to the worst."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: what was looked at.
        status: ``ok``; ``warning``: runs work, some of them or slower; ``problem``: a run would fail.
        found: what was seen there.
        fix: what to do, as an instruction; None where all is well.
    """

    check: str
    status: Status
    found: str
    fix: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Plain JSON values."""
        return {"check": self.check, "status": self.status, "found": self.found, "fix": self.fix}


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Finding:
    """Something that some runs will meet."""
    return Finding(check, "warning", found, fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """Something that a run will fail with."""
    return Finding(check, "problem", found, fix)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among them; ``ok`` for none."""
    return max((finding.status for finding in findings), key=ORDER.index, default="ok")
