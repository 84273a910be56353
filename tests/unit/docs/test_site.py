"""The site builds without a warning, and its pages, README.md among them, lead to what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.doc_blocks import code_blocks, pages
from support.launching import REPOSITORY

from dsmixer.cli.main import build_parser
from dsmixer.config.recipe import load_recipe
from dsmixer.config.schema import Recipe

DOCS = REPOSITORY / "docs"
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
IN_A_BLOCK = re.compile(r"(?:[A-Z_]+=\S+ )?(dsmixer [a-z]+.*)")
SECTION = re.compile(rf"(?:{'|'.join(Recipe.model_fields)}):")


def menu_pages(menu: object) -> Iterator[str]:
    """The pages of a menu, in its order."""
    if isinstance(menu, str):
        yield menu
    for entry in menu if isinstance(menu, list) else menu.values() if isinstance(menu, dict) else ():
        yield from menu_pages(entry)


def build(configuration: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(configuration)]
    return subprocess.run([*command, "-d", str(out)], capture_output=True, text=True, check=False)


def test_the_site_builds_strictly_and_needs_no_other_site(tmp_path: Path) -> None:
    done = build(REPOSITORY / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = list(menu_pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    for name in names:
        html = (tmp_path / name).with_suffix(".html").read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", html)
        assert not fetched, f"{name} fetches {fetched}"


def test_a_link_to_no_page_or_no_heading_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[gone](gone.md) [odd](index.md#not-there)\n")
    content = (REPOSITORY / "mkdocs.yml").read_text().split("\nnav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{content}\nnav: [index.md]\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "gone.md" in done.stderr and "not-there" in done.stderr


def test_the_menu_has_every_page_and_the_first_page_leads_to_each() -> None:
    names = list(menu_pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert sorted(names) == sorted(path.name for path in DOCS.glob("*.md"))
    linked = LINK.findall((DOCS / "index.md").read_text(encoding="utf-8"))
    assert set(names) - {"index.md"} <= {target for target, _ in linked}


def test_readme_leads_to_files_that_are_there() -> None:
    targets = {target for target, _ in LINK.findall((REPOSITORY / "README.md").read_text(encoding="utf-8"))}
    files = {target for target in targets if not target.startswith("https:")}
    assert files and all((REPOSITORY / target).exists() for target in files), files


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_shown_commands_have_only_options_that_there_are(page: Path) -> None:
    """Inline code and blocks, whether they are run or not."""
    options = options_of(build_parser())
    for words in shown_commands(page):
        place = max(n for n in (1, 2) if n == 1 or tuple(words[1:3]) in options)
        command = tuple(words[1 : 1 + place])
        assert command in options, f"there is no command {' '.join(words)}"
        odd = {re.split("[=`]", word)[0] for word in words if word.startswith("--")} - options[command]
        assert not odd, f"{' '.join(command)} has no {odd}"


def shown_commands(page: Path) -> Iterator[list[str]]:
    """The words of each ``dsmixer COMMAND ...`` of a page, in its text or in a block, comments left out."""
    shown = re.findall(r"`(dsmixer [a-z]+[^`]*)`", page.read_text(encoding="utf-8"))
    for _, language, block in code_blocks(page):
        if language in ("", "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            shown += [found[1] for line in lines if (found := IN_A_BLOCK.match(line))]
    for line in shown:
        words = re.split(r"\s#|\s\||\s>", line)[0].split()
        if re.fullmatch("[a-z]+", words[1]):
            yield words


def options_of(parser: object, command: tuple[str, ...] = ()) -> dict[tuple[str, ...], set[str]]:
    """The options of every command."""
    found = {command: {"--help", *parser._option_string_actions}}  # type: ignore[attr-defined]
    for action in parser._actions:  # type: ignore[attr-defined]
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, below in action.choices.items():
                found |= options_of(below, (*command, name))
    return found


def shown_recipes() -> Iterator[tuple[str, str]]:
    """Place and text of each block that begins with a section of a recipe and is written out."""
    for page in pages():
        for place, _, text in code_blocks(page):
            if SECTION.match(text) and "…" not in text and "..." not in text:
                yield place, text.split("# or\n")[0]


@pytest.mark.parametrize(("place", "text"), list(shown_recipes()))
def test_shown_parts_of_recipes_have_only_keys_and_values_that_there_are(
    place: str, text: str, tmp_path: Path
) -> None:
    part = yaml.safe_load(text)
    part.setdefault("data", {})
    part.setdefault("base", {}).setdefault("model", "somewhere")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(part), encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml", [])


def test_recipes_are_found_on_the_pages() -> None:
    assert len(list(shown_recipes())) > 10
