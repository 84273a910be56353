"""The rule of targets against PEFT's own."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from dsmixer.adapters.target_rule import pattern_values, targeted
from dsmixer.config.errors import UserError

NAMES = [
    f"{top}.{layers}.{number}.{part}"
    for top in ("model", "model.vision_tower", "transformer")
    for layers in ("layers", "h", "block_list.0.layers")
    for number in (0, 1, 10, 11)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.1.up_proj", "xq_proj", "norm")
] + ["lm_head", "q_proj", "classifier", "model.q_proj.0.inner"]

RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "lm_head"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "0.xq_proj", "no_such", ""]},
    {"target_modules": ["q_proj"], "exclude_modules": ["vision_tower", "1.self_attn.q_proj", "q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision.*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": [r"\w+"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r"(?!.*vision).*(q|v)_proj$"},
    {"target_modules": r"^model\.(?:layers|h)\.\d{1,2}\.(?:self_attn|mlp).*|lm_head"},
    {"target_modules": r"(?i).*Q_PROJ", "exclude_modules": ["lm_head"]},
    {"target_modules": "classifier"},
    {"target_modules": ".*norm", "exclude_modules": r"transformer\..*"},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_names_that_peft_targets_are_targeted(rule: dict[str, Any]) -> None:
    config = LoraConfig(**rule)
    theirs = [name for name in NAMES if check_target_module_exists(config, name)]
    assert targeted(rule, rule["target_modules"], NAMES, "adapter_config.json") == theirs


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 3, "model.layers.0.self_attn.q_proj": 5},
        {"model.layers.0.self_attn.q_proj": 5, "q_proj": 3},
        {r".*\.1\..*": 2, "v_proj": 4, "^lm_head": 9},
        {r"(q|v)_proj": 7, r"layers\.\d+\.xq_proj": 1},
        {"layers.1": 2, "self.attn.q.proj": 6},
    ],
    ids=str,
)
def test_patterns_of_ranks_are_matched_as_peft_matches_them(patterns: dict[str, int]) -> None:
    theirs = {name: patterns.get(get_pattern_key(list(patterns), name), 8) for name in NAMES}
    assert pattern_values(patterns, 8, NAMES, "adapter_config.json") == theirs


def test_a_pattern_that_would_take_years_is_given_up() -> None:
    with pytest.raises(UserError, match="can't be matched within"):
        targeted({}, "(([a-z._0-9]+)+)+!", ["model.layers.0.self_attn.q_proj" * 3], "adapter_config.json")
