"""YAML is read by the rules a recipe's writer has in mind, and every key's line is known."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmixer.config.errors import UserError
from dsmixer.config.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E3", -2000.0),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-7", -7),
        ("1:30", "1:30"),
        ("007", "007"),
        ("2024-01-02", "2024-01-02"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'1e-5'", "1e-5"),
        ("~", None),
        ("true", True),
    ],
)
def test_scalars_are_read_as_their_writer_means_them(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}", "f").value["key"]
    assert found == value and type(found) is type(value)


def test_every_key_has_its_line_also_in_lists_flow_style_and_merges() -> None:
    text = "a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\nc:\n  - {p: 1,\n     q: 2}\n  - 5\n"
    parsed = parse_yaml(text, "f")
    assert parsed.value == yaml.safe_load(text)
    b = {"b": 4, "b.x": 2, "b.y": 6}
    c = {"c": 7, "c.0": 8, "c.0.p": 8, "c.0.q": 9, "c.1": 10}
    assert parsed.lines == {"a": 1, "a.x": 2, "a.y": 3, **b, **c}


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("a:\n  b: [1, 2\nc: 3\n", "f:3", "malformed YAML"),
        ("a: 1\n\tb: 2\n", "f:2", "malformed YAML"),
        ("a: b: c\n", "f:1", "malformed YAML"),
        ("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3\n", "f:5: c.d", "written twice, on lines 3 and 5"),
        ("- {a: 1, a: 2}\n", "f:1: 0.a", "written twice"),
        ("a:\n  1: x\n", "f:2", "'1' cannot be a key in a"),
        ("? [a]\n: 1\n", "f:1", "cannot be a key"),
        ("a: !!python/object:os.system {}\n", "f:1", "malformed YAML"),
        ("a: !!int x\n", "f", "cannot be read"),
        ("a: *missing\n", "f:1", "malformed YAML"),
        ("a: &a\n  b: *a\n", "f:1", "alias stands inside itself"),
        ("a: 1\n---\nb: 2\n", "f:2", "malformed YAML"),
        ("a: 1\nb: \x01\n", "f:2", "does not allow"),
    ],
)
def test_bad_yaml_names_its_line(text: str, where: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "f")
    assert error.value.where == where
    assert says in error.value.problem


TRAPS = ["1e5", "12345e67", "007", "no", "1:30", "2024-01-02", "null", "~", "0x1f", "1_0", "", "-", ".5e3"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=12),
    st.sampled_from(TRAPS),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.one_of(SCALARS, st.lists(SCALARS, max_size=3))))
def test_dumped_yaml_reads_back_the_same_here_and_under_yaml_1_1(value: dict[str, object]) -> None:
    text = dump_yaml(value)
    for found in (parse_yaml(text, "f").value, yaml.safe_load(text)):
        assert found == value
        assert repr(found) == repr(value)  # 1 and 1.0 and True are equal to Python
