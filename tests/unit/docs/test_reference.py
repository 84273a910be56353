"""The pages that are made of the code say what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.launching import REPOSITORY

import dsmixer
from dsmixer.cli.main import main
from dsmixer.config.schema import Recipe

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """docs/make_reference.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["reference.md", "commands.md", "python.md"])
def test_the_page_is_in_step_with_the_code(made: ModuleType, name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page.split() == made.PAGES[name]().split(), "run: python docs/make_reference.py"


def test_a_page_that_is_out_of_step_is_told(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in made.PAGES:
        (tmp_path / name).write_text((DOCS / name).read_text(encoding="utf-8"), encoding="utf-8")
    commands = tmp_path / "commands.md"
    commands.write_text(commands.read_text(encoding="utf-8").replace("--prompt TEXT", "--prompts TEXT"))
    monkeypatch.setattr(made, "DOCS", tmp_path)
    assert made.out_of_step() == ["commands.md"]


def test_the_reference_has_every_key_of_every_section() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    for section, field in Recipe.model_fields.items():
        part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
        keys = getattr(field.annotation, "model_fields", {})
        assert keys and all(f"| `{key}` |" in part for key in keys)


def test_the_commands_are_shown_as_they_print_their_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "102")  # argparse leaves two columns free
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    for command in (["generate"], ["pool", "add"], ["train"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        shown = text.split(f"# dsmixer {' '.join(command)}\n\n```text\n")[1].split("```")[0]
        assert shown.split() == capsys.readouterr().out.split()


def test_every_public_name_has_its_docstring_and_its_parameters() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    for name in dsmixer.__all__:
        part = text.split(f"\n### dsmixer.{name}\n")[1].split("\n### ")[0]
        thing = getattr(dsmixer, name)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            assert inspect.cleandoc(thing.__doc__ or "?").split("\n")[0] in part
        if inspect.isfunction(thing):
            assert all(f"{parameter}" in part for parameter in inspect.signature(thing).parameters)
