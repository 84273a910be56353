"""Settings of methods by name: what they change, and what is refused with the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsmixer.baselines.registry import methods
from dsmixer.baselines.settings import configured, settings_of
from dsmixer.config.errors import UserError


def test_dots_and_mappings_reach_the_same_field_and_nothing_else_changes() -> None:
    dotted = configured(methods, {"mole": {"balance": 0.1, "fitting.steps": 3}})
    nested = configured(methods, {"mole": {"balance": 0.1, "fitting": {"steps": 3}}})
    mole = methods["mole"]
    assert (
        dotted["mole"] == nested["mole"] == replace(mole, balance=0.1, fitting=replace(mole.fitting, steps=3))
    )
    assert {name: m for name, m in dotted.items() if name != "mole"} == {
        name: m for name, m in methods.items() if name != "mole"
    }


@pytest.mark.parametrize("name", list(methods))
def test_every_method_takes_its_own_settings_back(name: str) -> None:
    assert configured(methods, {name: settings_of(methods[name])}) == methods


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mol": {}}, ["mol", "write mole"]),
        ({"mole": {"fiting.steps": 3}}, ["mole.fiting.steps", "write fitting.steps"]),
        ({"mole": {"fitting.step": 3}}, ["mole.fitting.step", "fitting"]),
        ({"mole": {"steps": 3}}, ["mole.steps", "write fitting.steps"]),
        ({"mole": {"fitting": 3}}, ["mole.fitting", "fitting.steps"]),
        ({"mole": {"balance.x": 3}}, ["mole.balance.x", "write balance"]),
        ({"mole": 3}, ["no mapping"]),
        ({"arrow": {"top_k": 2.5}}, ["arrow.top_k", "2.5", "integer"]),
        ({"arrow": {"top_k": True}}, ["arrow.top_k", "integer"]),
        ({"arrow": {"top_k": 0}}, ["at least 1"]),
        ({"mole": {"balance": -0.5}}, ["at least 0"]),
        ({"mole": {"balance": float("nan")}}, ["not at least 0"]),
        ({"mole": {"fitting.scheduler": "cosin"}}, ["fitting.scheduler", "'cosine'"]),
    ],
)
def test_what_is_no_setting_is_refused_with_the_nearest(settings, words) -> None:
    with pytest.raises(UserError) as refused:
        configured(methods, settings, where="--method-settings: f.json")
    assert all(word in str(refused.value) for word in (*words, "f.json", "Fix: "))


def test_a_setting_that_may_be_null_takes_null_and_a_number() -> None:
    assert configured(methods, {"lora_lego": {"rank": 3}})["lora_lego"].rank == 3
    assert configured(methods, {"lora_lego": {"rank": None}}) == methods
    assert configured(methods, {"one_lora": {"scaling": 2}})["one_lora"].scaling == 2.0
