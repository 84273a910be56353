"""The page of recipe keys says what the schema says, and the site's menu leads to pages that are there."""

from __future__ import annotations

import os
import subprocess
import sys

import yaml
from support.launching import REPOSITORY

from dsmixer.config.schema import Recipe

DOCS = REPOSITORY / "docs"


def test_the_reference_is_in_step_with_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "make_reference.py"), "--check"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_has_every_key_of_every_section() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    for section, field in Recipe.model_fields.items():
        part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
        keys = getattr(field.annotation, "model_fields", {})
        assert keys and all(f"| `{key}` |" in part for key in keys)


def test_the_menu_names_pages_that_are_there() -> None:
    menu = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    pages = [page for entry in menu for page in entry.values()]
    assert all((DOCS / page).is_file() for page in pages)
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md"))
