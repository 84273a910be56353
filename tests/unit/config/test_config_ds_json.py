"""DeepSpeed JSON files: taken over, contradicted, refused, and accepted by DeepSpeed itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dsmixer.config import ds_file
from dsmixer.config.checks import check_recipe
from dsmixer.config.ds_json import deepspeed_config, merge_ds_config, resolved_zero_stage
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, load_recipe

Load = Callable[..., LoadedRecipe]
SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


@pytest.fixture
def ds(tmp_path: Path) -> Callable[[Any], str]:
    def write(values: Any) -> str:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values, indent=1))
        return str(path)

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_every_shipped_file_gives_a_configuration_that_deepspeed_accepts(load: Load, path: Path) -> None:
    loaded = load("", f"deepspeed.config={path}", "stage2.micro_batch_size=2")
    check_recipe(loaded)
    config = deepspeed_config(loaded, loaded.recipe.stage2, 1)
    assert "auto" not in json.dumps(config)
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_config.stage == int(path.name.removeprefix("qlora_").removeprefix("zero")[0])
    assert (parsed.zero_config.offload_optimizer is not None) == ("offload" in path.name)
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (8, 2)
    assert parsed.gradient_accumulation_steps == 4
    assert parsed.gradient_clipping == 0
    # DeepSpeed refuses a client optimizer under offloading, and under ZeRO, unless told so
    assert parsed.zero_force_ds_cpu_optimizer is False and parsed.zero_allow_untested_optimizer is True


def test_the_five_stages_are_shipped() -> None:
    names = [path.name for path in SHIPPED]
    assert {"zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"} <= set(names)


@pytest.mark.parametrize("mode", ["auto", "weights"])
def test_without_a_file_the_engine_gets_what_the_recipe_says(load: Load, mode: str) -> None:
    loaded = load(
        "stage1: {global_batch_size: 12, micro_batch_size: 2, clip: 0.5}\n", f"placement.mode={mode}"
    )
    config = deepspeed_config(loaded, loaded.recipe.stage1, 3)
    assert config["train_batch_size"] == 12
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.0
    assert config["zero_allow_untested_optimizer"] is True
    assert config["steps_per_print"] >= 10**6
    zero = config["zero_optimization"]
    assert zero["stage"] == (3 if mode == "weights" else 2)
    assert zero["contiguous_gradients"] and zero["reduce_scatter"]
    assert zero["reduce_bucket_size"] * 4 <= 256 * 2**20
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & set(config)


FULL = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.7,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": False},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.002, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "wall_clock_breakdown": True,
}


def test_what_only_the_file_says_is_taken_over_for_both_stages(load: Load, ds: Callable[[Any], str]) -> None:
    merged, warnings = merge_ds_config(load(), ds(FULL))
    for stage in (merged.recipe.stage1, merged.recipe.stage2):
        assert (stage.micro_batch_size, stage.gradient_accumulation_steps, stage.clip) == (2, 3, 0.7)
        assert (stage.learning_rate, stage.betas, stage.eps, stage.weight_decay) == (
            0.002,
            (0.8, 0.9),
            1e-7,
            0.0,
        )
        assert stage.scheduler == "linear"
    assert merged.recipe.deepspeed.zero_stage == 1
    assert len(warnings) == 1 and "bf16.enabled" in warnings[0] and "\n" not in warnings[0]
    config = deepspeed_config(merged, merged.recipe.stage1, 2)
    assert config == deepspeed_config(load(), load().recipe.stage1, 2, ds(FULL))
    assert config["train_batch_size"] == 12
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["overlap_comm"] is False
    assert not {"optimizer", "scheduler", "bf16"} & set(config)


def test_merging_twice_changes_nothing_and_the_result_loads_back(
    load: Load, ds: Callable[[Any], str], tmp_path: Path
) -> None:
    once, _ = merge_ds_config(load(), ds({**FULL, "train_batch_size": 12}))
    assert merge_ds_config(once)[0].recipe == once.recipe
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_recipe(once.recipe))
    assert merge_ds_config(load_recipe(saved))[0].recipe == once.recipe


CONTRADICTIONS = [
    (
        {"train_micro_batch_size_per_gpu": 4},
        "stage1:\n  micro_batch_size: 2\n",
        "stage1.micro_batch_size",
        "4",
        "2",
    ),
    (
        {"gradient_accumulation_steps": 8},
        "stage2:\n  gradient_accumulation_steps: 2\n",
        "accumulation_steps",
        "8",
        "2",
    ),
    ({"train_batch_size": 64}, "stage1:\n  global_batch_size: 32\n", "stage1.global_batch_size", "64", "32"),
    ({"zero_optimization": {"stage": 3}}, "deepspeed:\n  zero_stage: 2\n", "deepspeed.zero_stage", "3", "2"),
    ({"gradient_clipping": 0.5}, "stage1:\n  clip: 1.0\n", "stage1.clip", "0.5", "1.0"),
    ({"gradient_clipping": 0.0}, "stage1:\n  clip: 1.0\n", "stage1.clip", "0.0", "1.0"),
    (
        {"optimizer": {"params": {"lr": 0.1}}},
        "stage2:\n  learning_rate: 2e-4\n",
        "learning_rate",
        "0.1",
        "0.0002",
    ),
    (
        {"scheduler": {"type": "WarmupLR"}},
        "stage1:\n  scheduler: cosine\n",
        "stage1.scheduler",
        "WarmupLR",
        "cosine",
    ),
    ({"bf16": {"enabled": True}}, "", "base.dtype", "True", "float32"),
]


@pytest.mark.parametrize(
    ("values", "more", "key", "theirs", "ours"), CONTRADICTIONS, ids=[c[2] for c in CONTRADICTIONS]
)
def test_a_contradiction_names_both_values_and_both_places(
    load: Load, ds: Callable[[Any], str], values: dict[str, Any], more: str, key: str, theirs: str, ours: str
) -> None:
    path = ds(values)
    loaded = load(more, f"deepspeed.config={path}", *(["base.dtype=float32"] if key == "base.dtype" else []))
    with pytest.raises(UserError) as error:
        check_recipe(loaded)
    assert key in str(error.value.where) and ours in error.value.problem
    assert f"{theirs}" in error.value.problem and f"{path}:" in error.value.problem
    assert '"auto"' in str(error.value.fix)


def test_the_same_value_in_both_and_auto_are_no_contradiction(load: Load, ds: Callable[[Any], str]) -> None:
    path = ds(
        {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": "auto", "zero_optimization": {"stage": 2}}
    )
    more = "stage1: {micro_batch_size: 2, clip: 0.1}\ndeepspeed: {zero_stage: 2}\n"
    assert merge_ds_config(load(more), path)[0].recipe.stage1.clip == 0.1


def test_auto_and_null_in_the_recipe_leave_a_value_to_the_file(load: Load, ds: Callable[[Any], str]) -> None:
    path = ds({"train_batch_size": 6, "zero_optimization": {"stage": 3}})
    more = "stage1: {global_batch_size: null}\ndeepspeed: {zero_stage: auto}\n"
    recipe = merge_ds_config(load(more), path)[0].recipe
    assert (recipe.stage1.global_batch_size, recipe.deepspeed.zero_stage) == (6, 3)
    with pytest.raises(UserError, match="stage1.clip is None here and 0.5 in"):
        merge_ds_config(load("stage1: {clip: null}\n"), ds({"gradient_clipping": 0.5}))


def test_the_files_batch_sizes_must_fit_the_world(load: Load, ds: Callable[[Any], str]) -> None:
    path = ds({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4})
    loaded = load()
    assert deepspeed_config(loaded, loaded.recipe.stage1, 2, path)["train_batch_size"] == 16
    with pytest.raises(
        UserError, match=r"ds.json:2: train_batch_size: .*need 2 accumulation steps, and 4 .*ds.json:4"
    ):
        deepspeed_config(loaded, loaded.recipe.stage1, 4, path)


def test_the_file_of_the_command_line_stands_over_the_recipes(load: Load, ds: Callable[[Any], str]) -> None:
    merged, _ = merge_ds_config(
        load("deepspeed: {config: absent.json}\n"), ds({"zero_optimization": {"stage": 1}})
    )
    assert resolved_zero_stage(merged.recipe) == 1
    with pytest.raises(UserError, match="command line: --deepspeed_config gone.json: no such file"):
        merge_ds_config(load(), "gone.json")


def test_the_placement_is_checked_against_the_files_zero_stage(load: Load, ds: Callable[[Any], str]) -> None:
    path = ds({"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=r"replicate does not go with ZeRO stage 3 \(.*ds.json:3: zero_opt"):
        check_recipe(load("placement: {mode: replicate}\n"), path)
    check_recipe(load("placement: {mode: weights}\n"), path)


REFUSED = [
    ('{"a": 1,\n "b": }', "ds.json:2", "malformed JSON"),
    ("[1]", "ds.json", "is a JSON object"),
    ('{"a": 1, "a": 2}', "ds.json", "'a' is written twice"),
    ({"fp16": {"enabled": True}}, "ds.json:3: fp16.enabled", "not supported"),
    ({"amp": {"enabled": True}}, "amp.enabled", "not supported"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "not supported"),
    ({"bf16": True}, "ds.json:2: bf16", "not an object"),
    ({"zero_optimisation": {"stage": 1}}, "zero_optimisation", "knows no key"),
    ({"zero_optimization": {"stge": 1}}, "zero_optimization.stge", "knows no key"),
    ({"zero_optimization": {"stage": 5}}, "ds.json:3: zero_optimization.stage", "5 (a whole number) is not"),
    (
        {"train_micro_batch_size_per_gpu": "two"},
        "ds.json:2: train_micro",
        "'two' (text) is not a whole number",
    ),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "'Lamb' is not supported"),
    (
        {"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
        "optimizer.params.amsgrad",
        "not supported",
    ),
    ({"scheduler": {"type": "OneCycle"}}, "scheduler.type", "'OneCycle' is not supported"),
    (
        {"scheduler": {"params": {"warmup_num_steps": 10}}},
        "scheduler.params.warmup_num_steps",
        "10 is not supported",
    ),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "mean over the ranks"),
    (
        {"optimizer": {"params": {"lr": 0.1}}, "scheduler": {"params": {"warmup_max_lr": 0.2}}},
        "scheduler.params.warmup_max_lr",
        "both set stage1.learning_rate",
    ),
]


@pytest.mark.parametrize(("values", "where", "problem"), REFUSED, ids=[f"{c[1]}:{c[2]}" for c in REFUSED])
def test_a_bad_file_is_refused_with_its_place(
    load: Load, ds: Callable[[Any], str], values: Any, where: str, problem: str
) -> None:
    with pytest.raises(UserError) as error:
        merge_ds_config(load(), ds(values))
    assert where in str(error.value.where) and "ds.json" in str(error.value.where)
    assert problem in error.value.problem


def test_lines_are_known_in_files_indented_with_tabs(load: Load, ds: Callable[[Any], str]) -> None:
    with pytest.raises(UserError, match="ds.json:3: fp16.enabled"):
        merge_ds_config(load(), ds('{\n\t"fp16": {\n\t\t"enabled": true\n\t}\n}\n'))


def test_the_keys_that_misspellings_are_held_against_are_deepspeeds() -> None:
    fields = DeepSpeedZeroConfig.model_fields
    theirs = set(fields) | {field.alias for field in fields.values()}
    assert set(ds_file._KNOWN_ZERO) <= theirs
