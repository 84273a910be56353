"""Python and the packages: what is installed, whether it goes together, and whether it imports.

What goes together is not written down here: it is in the packages' own metadata, first of all in that of
dsmixer, and the tested versions are those of ``constraints.txt``, where there is a checkout.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import dsmixer
from dsmixer.training.machine.finding import Finding, ok, problem, warning
from dsmixer.training.machine.probing import Answers

SHOWN_ALONE = ("torch", "deepspeed", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
"""Packages with a line of their own; the others share one."""

ROOT = Path(dsmixer.__file__).parents[1]
SHOWN = 5


@dataclass(frozen=True)
class Misfit:
    """A package that another one does not go with.

    Attributes:
        package: its name.
        found: the installed version; None: it is not installed.
        wanted: the versions that go.
        by: the package that says so.
    """

    package: str
    found: str | None
    wanted: str
    by: str

    def __str__(self) -> str:
        found = "is not installed" if self.found is None else f"is {self.found}"
        return f"{self.package} {found}, and {self.by} needs {self.wanted or 'it'}"


def check_software(answers: Answers) -> list[Finding]:
    """Python, each of the large packages, and the rest of what they need."""
    wanted, requires_python = own_requirements()
    misfits, versions = compare(wanted)
    tested = read_pins(ROOT / "constraints.txt")
    findings = [_python(requires_python)]
    for name in SHOWN_ALONE:
        own = [misfit for misfit in misfits if misfit.package == name]
        findings.append(_package(name, versions.get(name), own, tested.get(name), answers))
    rest = {name: version for name, version in versions.items() if name not in SHOWN_ALONE}
    others = [misfit for misfit in misfits if misfit.package not in SHOWN_ALONE]
    return [*findings, _others(rest, others, tested), _launcher()]


def own_requirements() -> tuple[list[str], str]:
    """What dsmixer needs, and of which Python: from pyproject.toml in a checkout, else from its metadata."""
    source = ROOT / "pyproject.toml"
    if source.is_file():  # a checkout: its metadata may be of an older installation
        project = tomllib.loads(source.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "dsmixer":
            return list(project["dependencies"]), str(project["requires-python"])
    try:
        own = metadata.distribution("dsmixer")
    except metadata.PackageNotFoundError:
        return [], ""
    return list(own.requires or ()), str(own.metadata["Requires-Python"] or "")


def read_pins(constraints: Path) -> dict[str, str]:
    """Package to version of a constraints file; nothing where there is none."""
    if not constraints.is_file():
        return {}
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def compare(wanted: list[str]) -> tuple[list[Misfit], dict[str, str]]:
    """Hold every package that is needed, and what those need, against what is installed.

    Args:
        wanted: requirements of dsmixer, as in its metadata.

    Returns:
        What does not fit, and the installed version of every package that is needed.
    """
    versions: dict[str, str] = {}
    misfits: list[Misfit] = []
    left = [("dsmixer", text) for text in wanted]
    while left:
        by, text = left.pop(0)
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of an old package, in a form that pip does not read any more either
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        first = name not in versions
        found = _installed(name)
        if found is None or not _fits(requirement.specifier, found):
            misfits.append(Misfit(name, found, str(requirement.specifier), by))
        if found is not None and first:
            versions[name] = found
            left += [(name, below) for below in metadata.requires(name) or ()]
    return misfits, versions


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(specifier: SpecifierSet, version: str) -> bool:
    try:
        return specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _python(wanted: str) -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if not _fits(SpecifierSet(wanted), platform.python_version()):
        return problem(
            "Python", f"{found}; dsmixer needs {wanted}", "make the environment with such a Python"
        )
    if sys.platform != "linux":
        fix = "use a Linux machine, container or virtual machine"
        return problem("Python", f"{found}; training runs on Linux alone", fix)
    return ok("Python", found)


def _package(
    name: str, version: str | None, misfits: list[Misfit], tested: str | None, answers: Answers
) -> Finding:
    answer = answers[name]
    if misfits:
        return problem(name, "; ".join(map(str, misfits[:SHOWN])), _install(name, tested))
    if answer.needed is not None:
        fix = f"see {answer.needed}"
        return warning(name, f"{version}, {answer.trouble}", fix)
    if answer.failed:
        fix = f"{_install(name, tested)} (with --force-reinstall where the version is right)"
        return problem(name, f"{version} does not import: {answer.trouble}", fix)
    if tested is not None and not _same(version, tested):
        return warning(name, f"{version}, which fits and is not what is tested", _install(name, tested))
    return ok(name, f"{version}" + (", as tested" if tested else ""))


def _launcher() -> Finding:
    """The launcher that the shell finds, which starts the ranks with its own Python."""
    path = shutil.which("deepspeed")
    fix = f"activate the environment: source {Path(sys.executable).parent}/activate"
    if path is None:
        return warning("launcher", "there is no deepspeed on PATH", fix)
    try:
        with open(path, "rb") as script:
            other = re.match(rb"#!\s*(/\S*)/python[0-9.]*\s", script.readline())
    except OSError as error:
        return warning("launcher", f"{path} can't be read: {error.strerror}", fix)
    if other is not None and Path(other[1].decode()) != Path(sys.executable).parent:
        return warning("launcher", f"{path} is of another environment, {other[1].decode()}", fix)
    return ok("launcher", path)


def _others(versions: Mapping[str, str], misfits: list[Misfit], tested: Mapping[str, str]) -> Finding:
    if misfits:
        found = "; ".join(map(str, misfits[:SHOWN]))
        more = len(misfits) - SHOWN
        names = " ".join(dict.fromkeys(f"'{m.package}{m.wanted}'" for m in misfits))
        return problem(
            "other packages",
            found + (f"; and {more} more" if more > 0 else ""),
            f"pip install {_pins()}{names}",
        )
    moved = list(_moved(versions, tested))
    if moved:
        found = f"{len(versions)} fit each other; not as tested: {', '.join(moved[:SHOWN])}"
        more = len(moved) - SHOWN
        fix = f"pip install {_pins()}-e . brings the tested ones"
        return warning("other packages", found + (f" and {more} more" if more > 0 else ""), fix)
    return ok("other packages", f"{len(versions)} fit each other" + (", as tested" if tested else ""))


def _moved(versions: Mapping[str, str], tested: Mapping[str, str]) -> Iterator[str]:
    for name, version in versions.items():
        if name in tested and not _same(version, tested[name]):
            yield f"{name} {version} ({tested[name]})"


def _same(version: str | None, tested: str) -> bool:
    """Whether two versions are one; builds of it, such as +cpu or +cu126, count alike."""
    try:
        return version is not None and Version(version).public == Version(tested).public
    except InvalidVersion:
        return False


def _pins() -> str:
    file = ROOT / "constraints.txt"
    return f"-c {file} " if file.is_file() else ""


def _install(name: str, tested: str | None) -> str:
    return f"pip install {_pins()}{name}{'' if tested is None else f'=={tested}'}"
