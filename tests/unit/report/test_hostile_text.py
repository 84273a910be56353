"""Texts and names that would break a page or disguise what it says: its shape stays, and they are escapes."""

from __future__ import annotations

import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsmixer.report.html import VOID
from dsmixer.report.page import build_report
from dsmixer.report.text import harmless

EVIL_NAMES = (
    "</style></script><script>alert(1)</script>",
    "‮ssehc‬\u200b\x1b[31m",  # reads "chess" from right to left
    "co\x00de\ud800\"><img src=x onerror=alert(1)>'",
)
TEXT = "Sue said|nothing at|all"
EVIL_TEXT = "</script><script>alert(2)</script>|‮txet neddih⁦\u2028|<!-- \x07\x1b]8;;http://evil.example\x07"


class Shape(HTMLParser):
    """The elements of a page in order, with their classes; text apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shape: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append(f"{tag}.{dict(attrs).get('class')}")
        self.attributes += attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        self.shape.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, run_name: str) -> str:
    """The report of a run renamed to ``run_name``."""
    config = folder / "config.yaml"
    named = config.read_text(encoding="utf-8").replace("three_domains", json.dumps(run_name))
    config.write_text(named, encoding="utf-8")
    return build_report(folder).read_bytes().decode("utf-8")


def without_glyphs(shape: list[str]) -> list[str]:
    """Figures differ in their clips and ticks with the length of names: outside of them the shape counts."""
    kept, inside = [], False
    for element in shape:
        inside = inside or element.startswith("svg.")
        if not inside:
            kept.append(element)
        inside = inside and element != "/svg"
    return kept


@pytest.fixture(scope="module")
def pages(write_run, tmp_path_factory):
    """A run whose names and texts mean no harm, and one of the same form whose do."""
    folder = tmp_path_factory.mktemp("pages")
    plain = page_of(write_run(folder / "plain", text=TEXT), "mine")
    hostile = write_run(folder / "hostile", domains=EVIL_NAMES, text=EVIL_TEXT)
    return plain, page_of(hostile, "</title><script>alert(0)</script>‮")


def test_hostile_names_and_texts_leave_the_page_as_it_is(pages):
    plain, hostile = (Shape(page) for page in pages)
    assert without_glyphs(hostile.shape) == without_glyphs(plain.shape)
    assert not {"script", "img", "a.b"} & {element.partition(".")[0] for element in hostile.shape}
    assert sum(element.startswith("svg.") for element in hostile.shape) == 11
    for name, value in hostile.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "xlink:href") or (value or "").startswith(("#", "data:"))


def test_nothing_on_the_page_is_invisible_or_turns_text_round(pages):
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    found = {sign for sign in pages[1] if unicodedata.category(sign) in hidden}
    assert found == {"\n"}
    shown = Shape(pages[1]).text
    for written in (
        r"\u202essehc\u202c\u200b\x1b[31m",
        r"\x00de\ud800",
        r"\u202etxet",
        r"neddih\u2066\u2028",
    ):
        assert written in shown, written
    assert "</script><script>alert(2)</script>" in shown  # as text, in a token of its own


def test_the_page_forbids_what_is_not_in_it(pages):
    policy = [value for name, value in Shape(pages[0]).attributes if value and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_harmless_keeps_every_script_and_blank():
    for text in ("日本語 العربية עברית é ß", "a\u00a0b\u3000c", "one\n\ttwo"):
        assert harmless(text) == text
    assert harmless("a\u00ad\ufeff\U000e0041b") == r"a\xad\ufeff\U000e0041b"
    assert harmless("one\ntwo", keep="") == r"one\ntwo"
