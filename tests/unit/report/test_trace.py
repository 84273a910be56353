"""The two views of a traced text: what they show, and that text of a stranger stays text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dsmixer.config.errors import UserError
from dsmixer.report.trace_data import Trace, TracedToken
from dsmixer.report.trace_page import check_target, trace_page
from dsmixer.report.trace_terminal import show_trace

ROUTERS = tuple(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv")
HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>"\'&'


def token(number, text, part, *weights):
    if not weights:
        return TracedToken(number, text, part)
    names = ("law", HOSTILE, "quiet")
    heard = sorted(zip(names, weights, strict=True), key=lambda pair: -pair[1])
    return TracedToken(number, text, part, weights, 0.5, {path: heard[:2] for path in ROUTERS})


TRACE = Trace(
    f"mine {HOSTILE}",
    ("law", HOSTILE, "quiet"),
    ROUTERS,
    [
        token(1, "<b>Sue", "prompt", 0.7, 0.2, 0.1),
        token(2, " the", "prompt", 0.4, 0.3, 0.3),
        token(3, "\n", "prompt", 0.6, 0.3, 0.1),
        token(4, "東京", "answer", 0.1, 0.9, 0.0),
        token(5, "\x1b[31m", "answer", 0.3, 0.45, 0.25),
        token(6, "", "answer", 0.8, 0.2, 0.0),
        token(7, " end", "answer"),
    ],
)


class Page(HTMLParser):
    """Elements, their attributes and the text, of a page whose elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_needs_nothing_else_and_takes_no_text_for_markup():
    page = Page(trace_page(TRACE))
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "a", "b-sue"}
    for _, attributes in page.found:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    assert "url(" not in trace_page(TRACE) and "@import" not in trace_page(TRACE)
    assert page.text.count(HOSTILE) >= 3 and "<b>Sue" in page.text
    assert "\x1b" not in trace_page(TRACE)


def test_every_token_read_opens_to_its_weights_entropy_and_layers():
    page = trace_page(TRACE)
    parsed = Page(page)
    opened = [a for tag, a in parsed.found if tag == "details" and "token" in a["class"]]
    assert [a["class"] for a in opened] == [f"token e{e}" for e in (0, 0, 0, 1, 1, 0)]
    assert [a["style"] for a in opened] == [f"--w:{w:.2f}" for w in (0.7, 0.4, 0.6, 0.9, 0.45, 0.8)]
    assert page.count('class="layers"') == 6 and page.count("entropy 0.50 nats") == 6
    assert [tag for tag, a in parsed.found if a.get("class") == "token unread"] == ["span"]
    # one row a layer, one column a projection
    table = page[page.index('class="layers"') :]
    table = table[: table.index("</table>")]
    assert re.findall(r"<th>(.*?)</th>", table) == ["layer", "q", "v", "0", "1"]
    assert table.count("A .70") == 4


def test_the_page_is_made_for_phones_print_and_the_dark():
    page = trace_page(TRACE)
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 600px"):
        assert rule in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Page(
        page
    ).found


def shown(width=60, **options):
    stream = io.StringIO()
    show_trace(TRACE, Console(file=stream, width=width, highlight=False, **options))
    return stream.getvalue()


def test_without_colour_letters_stand_under_their_tokens():
    lines = shown().splitlines()
    assert lines[:3] == ["prompt", "<b>Sue the⏎", "A     a   A"]
    assert lines[3:6] == ["answer", "東京\\x1b[31m· end", "B   b       A-   "]
    assert any(re.fullmatch(r"A +law +4 +0\.483", line) for line in lines)
    assert "0.50 nats of at most 1.10" in " ".join(lines) and "\x1b" not in shown()


def test_colour_adds_to_the_letters_and_takes_nothing(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(force_terminal=True, color_system="256")
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown(force_terminal=True, color_system="256"))


@pytest.mark.parametrize("width", [7, 9, 20])
def test_no_line_of_text_is_wider_than_the_terminal(width):
    from rich.cells import cell_len

    lines = shown(width).splitlines()
    texts = lines[: lines.index("answer")]
    assert len(texts) % 2 == 1 and all(cell_len(line) <= width for line in texts)
    assert "".join(texts[1::2]) == "<b>Sue the⏎"


def test_a_pool_of_two_hundred_has_letters_for_the_loudest_and_a_star_for_the_rest():
    weights = tuple((e + 1) / 20100 for e in range(200))
    one = TracedToken(1, "x", "answer", weights, 1.0, {})
    trace = Trace("big", [f"e{e}" for e in range(200)], (), [one, TracedToken(2, "y", "answer")])
    assert trace.symbols()[199] == "A" and trace.symbols()[0] == "*"
    assert "160 others" in Page(trace_page(trace)).text


def test_a_page_is_written_only_where_it_belongs(tmp_path):
    (tmp_path / "trace.html").write_text(trace_page(TRACE))
    check_target(tmp_path / "trace.html")
    check_target(tmp_path / "new.HTM")
    (tmp_path / "other.html").write_text("<p>mine</p>")
    (tmp_path / "folder.html").mkdir()
    for name in ("other.html", "folder.html", "page.txt", "absent/x.html"):
        with pytest.raises(UserError):
            check_target(tmp_path / name)
