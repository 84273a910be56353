"""The package's imports, read from its source, against the floors of the design: an import only goes down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "dsmixer"

FLOORS = (
    ("launch",),
    ("cli",),
    ("compare",),
    ("baselines",),
    ("training",),
    ("adapters", "evaluation"),
    ("model", "checkpoint", "data"),
    ("placement",),
    ("experts", "routing", "losses"),
    ("config",),
)
"""From the top; ``report`` stands apart."""

SIDEWAYS = {("routing", "experts"), ("losses", "routing")}
"""Between rooms of one floor, in one direction only: a router answers with an assignment to experts, and a
loss reads what a router put out."""

REPORT_MAY_IMPORT, MAY_IMPORT_REPORT = {"config", "report"}, {"cli", "training", "report"}


def room_of(file: Path) -> str:
    """``launch``, or the folder of the package that a file is in; ``""`` for the package's own files."""
    parts = file.relative_to(REPOSITORY).parts
    if parts[0] == "launch":
        return "launch"
    return parts[1] if len(parts) > 2 else ""


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, also inside functions and for type checking."""
    package = file.relative_to(REPOSITORY).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_between_rooms() -> Iterator[tuple[str, str, str]]:
    """(room, imported room, file) of each import of the package, the package's own front door left out."""
    for file in sorted([*PACKAGE.rglob("*.py"), *(REPOSITORY / "launch").rglob("*.py")]):
        room = room_of(file)
        for module in imported_modules(file):
            parts = module.split(".")
            inside = len(parts) > 1 and parts[0] == "dsmixer" and (PACKAGE / parts[1]).is_dir()
            if inside and room and parts[1] != room:
                yield room, parts[1], str(file.relative_to(REPOSITORY))


def floor_of(room: str) -> int:
    """0 at the bottom."""
    return next(height for height, rooms in enumerate(reversed(FLOORS)) if room in rooms)


def test_every_folder_of_the_package_has_a_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= {room for floor in FLOORS for room in floor} | {"report"}


def test_imports_go_down_and_sideways_only_where_it_is_written() -> None:
    found = [edge for edge in imports_between_rooms() if "report" not in edge[:2]]
    assert len({edge[:2] for edge in found}) > 10, "the reader of imports finds the package's"
    for room, imported, file in found:
        down = floor_of(imported) < floor_of(room)
        assert down or (room, imported) in SIDEWAYS, f"{file} ({room}) imports {imported}"


def test_the_report_knows_run_folders_and_configuration_alone() -> None:
    for room, imported, file in imports_between_rooms():
        if room == "report":
            assert imported in REPORT_MAY_IMPORT, f"{file} imports {imported}"
        if imported == "report":
            assert room in MAY_IMPORT_REPORT, f"{file} ({room}) imports report"
