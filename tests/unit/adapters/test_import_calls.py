"""What ``import_adapters`` is given besides folders: the model, options, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from support.sound_adapter import base, write_sound

from dsmixer.adapters.importing import import_adapters
from dsmixer.config.errors import UserError


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"topk": 2}, "topk: there is no such option"),
        ({"targets": "q_proj"}, "targets is the text 'q_proj'"),
        ({"rank": 2}, "rank come from the adapters"),
    ],
)
def test_an_option_that_is_none_is_refused_by_its_name(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        import_adapters(base(), {"law": write_sound(tmp_path / "law")}, **options)


@pytest.mark.parametrize("source", [None, "", " ", 7, ["law"]], ids=repr)
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(UserError, match="is no source of an adapter"):
        import_adapters(base(), {"law": source})


def test_adapters_without_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no names"):
        import_adapters(base(), [write_sound(tmp_path / "law")])  # type: ignore[arg-type]


def test_names_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    folder = write_sound(tmp_path / "law")
    with pytest.raises(UserError, match="the experts law and Law would share a folder"):
        import_adapters(base(), {"law": folder, "Law": folder})


def test_a_model_that_has_mixers_or_adapters_is_refused(tmp_path: Path) -> None:
    folder, mixed, loaded = write_sound(tmp_path / "law"), base(), base()
    import_adapters(mixed, {"law": folder})
    loaded.load_adapter(str(folder))
    for model, reason in (
        (mixed, "has mixers already"),
        (loaded, "has adapters of PEFT already"),
        (peft.PeftModel.from_pretrained(base(), folder), "has adapters of PEFT already"),
    ):
        with pytest.raises(UserError, match=reason):
            import_adapters(model, {"law": folder})
