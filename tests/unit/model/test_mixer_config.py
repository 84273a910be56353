"""The public configuration: what it refuses, and its way to JSON and back."""

from __future__ import annotations

import json

import pytest

from dsmixer.config.errors import UserError
from dsmixer.model.mixer_config import MixerConfig


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"experts": []}, "experts"),
        ({"experts": ["a", "a"]}, "experts"),
        ({"ranks": {"c": 4}}, "ranks"),
        ({"alphas": {"c": 4}}, "alphas"),
        ({"rank": 0}, "rank"),
        ({"ranks": {"a": -1}}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": -2.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alphas": {"a": 0}}, "alpha"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"router_std": 0.0}, "router_std"),
        ({"router_std": -0.02}, "router_std"),
        ({"router": "per_layer"}, "router"),
        ({"compute": "fast"}, "compute"),
        ({"routing": "hard"}, "routing"),
        ({"dropout": 1.0}, "dropout"),
        ({"top_k": 3}, "top_k"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(changes: dict[str, object], key: str) -> None:
    with pytest.raises(UserError) as caught:
        MixerConfig(**{"targets": ["q"], "experts": ["a", "b"], **changes})  # type: ignore[arg-type]
    assert f"mixer.{key}" in str(caught.value)


def test_it_survives_json_and_an_unknown_key_is_refused() -> None:
    config = MixerConfig(
        ["q"], ["a", "b"], rank=4, ranks={"b": 8}, alphas={"a": 2}, routing="top_p", top_p=0.7
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert MixerConfig.from_dict(values) == config
    assert config.rank_list == (4, 8) and config.alpha_list == (2, 128)
    with pytest.raises(UserError, match="colour"):
        MixerConfig.from_dict({**values, "colour": "red"})


@pytest.mark.parametrize(("num", "top_k"), [(1, 1), (2, 2), (3, 3), (7, 3)])
def test_a_mixture_routes_by_topk_with_at_most_three(num: int, top_k: int) -> None:
    routing = MixerConfig(["q"], [f"e{i}" for i in range(num)]).default_routing()
    assert (routing.mode, routing.top_k, routing.renormalize) == ("topk", top_k, True)
