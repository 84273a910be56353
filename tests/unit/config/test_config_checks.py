"""Keys that do not go together are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmixer.config.checks import accumulation_steps, check_recipe, check_world, is_local_path
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, load_recipe

Load = Callable[..., LoadedRecipe]

CASES = [
    (
        "stage1: {enabled: false}\nstage2: {enabled: false}\n",
        "stage2.enabled",
        "both stages are disabled",
        "true",
    ),
    ("stage2:\n  top_k: 3\n", "stage2.top_k", "3 experts a token, of 2 experts", "at most 2"),
    ("stage2:\n  top_k: 1\n", "stage2.top_k", "always weighs 1", "renormalize: false"),
    ("stage2:\n  preserve: {experts: [law, ches]}\n", "stage2.preserve.experts", "'ches'", "write chess"),
    (
        "stage1:\n  global_batch_size: 6\n  micro_batch_size: 4\n",
        "stage1.global_batch_size",
        "6 rows",
        "4 or 8",
    ),
    (
        "stage2:\n  gradient_accumulation_steps: null\n",
        "stage2.gradient_accumulation_steps",
        "neither",
        "number",
    ),
    (
        "stage2:\n  routing_loss: switch\n  rsl: {alpha: 0.2}\n",
        "stage2.rsl.alpha",
        "a setting of RSL",
        "lora_mixer",
    ),
    (
        "stage2:\n  routing_loss: [{loss: supervised_gate}]\n  data: {source: org/mixed}\n",
        "stage2.routing_loss",
        "no domain",
        "source: null",
    ),
    (
        "stage2:\n  routing_loss: aesl\nplacement:\n  mode: tokens\n",
        "placement.mode",
        "its experts are on several ranks",
        "mode: replicate",
    ),
    (
        "stage2:\n  routing_loss: [{loss: aesl_orthogonality}]\nplacement:\n  mode: weights\n",
        "placement.mode",
        "cut by ZeRO-3",
        "{loss: aesl_variance}",
    ),
    (
        "stage2:\n  routing_loss: aesl\ndeepspeed:\n  zero_stage: 3\n",
        "deepspeed.zero_stage",
        "cut by ZeRO-3",
        "mode: replicate",
    ),
    ("mixer:\n  targets: [q, v, q]\n", "mixer.targets", "'q' is named 2 times", "once"),
    ("mixer:\n  experts: []\n", "mixer.experts", "no expert", "null"),
    ("mixer:\n  experts: [{name: law}, {name: law}]\n", "mixer.experts.1.name", "'law' is taken", "own name"),
    (
        "mixer:\n  experts: [{name: law}, {name: x}]\n",
        "data.domains.1.name",
        "no expert is called 'chess'",
        "law, x",
    ),
    (
        "mixer:\n  experts: [{name: law}, {name: chess}, {name: go}]\n",
        "mixer.experts.2.name",
        "no domain is served by expert 'go'",
        "expert: go",
    ),
    (
        "mixer:\n  experts: [{name: law, path: ./absent}, {name: chess}]\n",
        "mixer.experts.0.path",
        "no such file or folder: ./absent",
        "check the path",
    ),
    (
        "mixer:\n  experts: [{name: law, path: org/law}, {name: chess}]\n",
        "mixer.experts.0.path",
        "'law' is imported",
        "stage1.enabled: false",
    ),
    (
        "stage1: {enabled: false}\nstage2:\n  experts: frozen\n",
        "stage2.experts",
        "nothing would ever train expert 'law'",
        "path",
    ),
    ("stage2:\n  data: {source: no.jsonl}\n", "stage2.data.source", "no such file", "check the path"),
    (
        "placement:\n  mode: tokens\ndeepspeed:\n  zero_stage: 0\n",
        "placement.mode",
        "tokens does not go with ZeRO stage 0",
        "1, 2 or 3",
    ),
    ("placement:\n  expert_parallel_size: 2\n", "placement.expert_parallel_size", "2 ranks", "tokens"),
    ("placement:\n  mode: weights\ndeepspeed: {zero_stage: 2}\n", "placement.mode", "not 2", "zero_stage: 3"),
    ("placement:\n  mode: replicate\ndeepspeed: {zero_stage: 3}\n", "placement.mode", "stage 3", "weights"),
    ("deepspeed:\n  config: absent.json\n", "deepspeed.config", "no such file: absent.json", "ds_configs"),
]


@pytest.mark.parametrize(("more", "key", "problem", "fix"), CASES, ids=[f"{c[1]}:{c[2]}" for c in CASES])
def test_what_does_not_go_together_is_refused(
    load: Load, tmp_path: Path, more: str, key: str, problem: str, fix: str
) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(load(more))
    assert str(error.value.where).startswith(f"{tmp_path}/recipe.yaml")
    assert str(error.value.where).endswith(f": {key}")
    assert problem in error.value.problem
    assert fix in str(error.value.fix)


@pytest.mark.parametrize(
    ("override", "key", "problem"),
    [
        ("base.double_quantization=false", "base.double_quantization", "base.quantization is none"),
        ("data.domains.0.train=absent.jsonl", "data.domains.0.train", "no such file or folder: absent.jsonl"),
        ("data.domains.1.test=~/x.jsonl", "data.domains.1.test", "no such file or folder"),
        ("data.domains.1.name=law", "data.domains.1.name", "'law' is taken by"),
        ("data.domains=[]", "data.domains", "no domain to train on"),
        ("base.model=./absent", "base.model", "no such file or folder: ./absent"),
        (
            "data.source={train: absent.csv, column: topic}",
            "data.source",
            "no such file or folder: absent.csv",
        ),
    ],
)
def test_what_an_override_breaks_is_named_as_typed(load: Load, override: str, key: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(load("", override))
    assert f"command line: {override}" in str(error.value.where)
    assert problem in error.value.problem


def test_flash_attention_has_no_float32(load: Load) -> None:
    with pytest.raises(UserError, match=r"base.attention=flash_attention_2: .*no float32"):
        check_recipe(load("", "base.dtype=float32", "base.attention=flash_attention_2"))


def test_hard_soft_is_refused_above_its_limit_and_allowed_at_it(load: Load) -> None:
    names = [f"data.domains.{i}={{name: d{i}, train: org/data}}" for i in range(33)]
    check_recipe(load("stage2: {routing: hard_soft}\n", *names[:32]))
    with pytest.raises(UserError, match="hard_soft computes all 33 experts"):
        check_recipe(load("stage2: {routing: hard_soft}\n", *names))


def test_one_expert_leaves_nothing_to_route(load: Load) -> None:
    one = "data.domains=[{name: a, train: org/data}]"
    with pytest.raises(UserError, match="nothing to route"):
        check_recipe(load("", one))
    check_recipe(load("stage2: {enabled: false}\n", one))


IMPORTED = """
stage1: {enabled: false}
stage2: {experts: frozen}
mixer:
  experts: [{name: law, path: org/a}, {name: chess, path: org/b}, {name: go, path: org/c}]
"""
GOOD = [
    "",
    "stage2: {top_k: 1, renormalize: false}\n",
    "stage2: {top_k: 1, routing: hard_soft}\n",
    "stage2: {routing_loss: ds_moe, rsl: {ramp: 0.0}}\n",
    "stage2: {routing_loss: [{loss: rsl}, {loss: z, settings: {weight: 0.01}}]}\n",
    "stage2: {routing_loss: aesl}\nplacement: {mode: replicate}\n",
    "stage2: {routing_loss: aesl}\ndeepspeed: {zero_stage: 1}\n",
    "stage2: {top_k: 3, enabled: false}\n",
    "placement: {mode: weights}\n",
    "placement: {mode: weights, expert_parallel_size: 1}\ndeepspeed: {zero_stage: 3}\n",
    "placement: {mode: replicate}\ndeepspeed: {zero_stage: 0}\n",
    "deepspeed: {zero_stage: 3}\n",
    "stage1: {enabled: false, gradient_accumulation_steps: null}\n",
    IMPORTED,
]


@pytest.mark.parametrize(
    ("more", "overrides"),
    [
        ("stage2: {routing_loss: switch}\n", []),
        ("stage2: {rsl: {alpha: 0.2, ramp: 0.5}}\n", ["stage2.routing_loss=switch"]),
    ],
)
def test_a_resolved_recipe_with_another_loss_than_rsl_passes_again(
    load: Load, tmp_path: Path, more: str, overrides: list[str]
) -> None:
    """All its defaults are written out, those of RSL too; a loss of the command line has put them back."""
    first = load(more, *overrides)
    check_recipe(first)
    (tmp_path / "config.yaml").write_text(dump_recipe(first.recipe))
    again = load_recipe(tmp_path / "config.yaml")
    check_recipe(again)
    assert again.recipe == first.recipe and again.recipe.stage2.rsl.alpha == 0.1
    assert again.recipe.stage2.rsl.ramp == (0.5 if overrides else 0.3)


@pytest.mark.parametrize("more", GOOD)
def test_what_goes_together_passes(load: Load, more: str) -> None:
    check_recipe(load(more))


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("openai/gsm8k", False),
        ("gsm8k", False),
        ("openai/gsm8k@main", False),
        ("openai/gsm8k@refs/convert/parquet", False),
        ("openai/gsm8k@", True),
        ("train.jsonl@main", True),
        ("./folder@main", True),
        ("data/train.jsonl", True),
        ("train.parquet", True),
        ("./folder", True),
        ("../x", True),
        ("/abs", True),
        ("~/x", True),
        ("a/b/c", True),
        ("/" + "a" * 5000, True),
    ],
)
def test_paths_are_told_from_hub_ids(text: str, local: bool) -> None:
    assert is_local_path(text) is local


def test_accumulation_follows_from_the_global_batch_and_the_world(load: Load) -> None:
    loaded = load("stage1: {global_batch_size: 24, micro_batch_size: 2}\n")
    assert loaded.recipe.stage1.gradient_accumulation_steps is None
    for world_size in (1, 2, 3, 4, 6, 12):
        assert accumulation_steps(loaded, "stage1", world_size) * world_size * 2 == 24
    assert check_world(loaded, 4) == {"stage1": 3, "stage2": 4}
    with pytest.raises(UserError) as error:
        check_world(loaded, 5)
    assert "24 rows cannot be dealt out to 5 ranks" in error.value.problem
    assert "write 20 or 30" in str(error.value.fix)


def test_a_stage_that_does_not_run_is_not_counted(load: Load) -> None:
    assert check_world(load("stage1: {enabled: false, global_batch_size: 7}\n"), 2) == {"stage2": 4}


def test_written_accumulation_must_be_the_one_that_follows(load: Load) -> None:
    loaded = load("stage1:\n  global_batch_size: 8\n  gradient_accumulation_steps: 4\n")
    assert accumulation_steps(loaded, "stage1", 2) == 4
    with pytest.raises(UserError) as error:
        accumulation_steps(loaded, "stage1", 4)
    assert "recipe.yaml:9: stage1.global_batch_size" in str(error.value)
    assert "recipe.yaml:10: stage1.gradient_accumulation_steps" in str(error.value)
