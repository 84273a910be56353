"""The shipped recipes: they load, their headers say the command that runs them, and their plans fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.launching import REPOSITORY
from transformers import FalconMambaConfig, LlamaConfig, MistralConfig, PretrainedConfig

from dsmixer.config.batch import check_world
from dsmixer.config.checks import check_recipe
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, expert_names, load_recipe
from dsmixer.data.readers import is_on_hub
from dsmixer.model.load import bare_base
from dsmixer.model.shape import model_shape
from dsmixer.placement.plan import make_plan
from dsmixer.placement.request import Cluster
from dsmixer.training.planning import PoolFacts, plan_request

RECIPES = REPOSITORY / "launch" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
LARGE = ["falcon_mamba_7b", "llama3_8b", "mistral_7b", "qlora_llama3_8b_24gb", "qlora_zero3_70b_8x80gb"]

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **HEADS
)
LLAMA3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    **{**HEADS, "num_attention_heads": 64},
)
MISTRAL_7B = MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    sliding_window=None,
    **HEADS,
)
FALCON_MAMBA_7B = FalconMambaConfig(
    vocab_size=65024,
    hidden_size=4096,
    intermediate_size=8192,
    num_hidden_layers=64,
    time_step_rank=256,
    tie_word_embeddings=False,
)
"""Sizes as the models' own config.json has them: the hub is not asked."""

CLUSTERS: dict[str, tuple[PretrainedConfig, int, int]] = {
    "falcon_mamba_7b": (FALCON_MAMBA_7B, 1, 80),
    "llama3_8b": (LLAMA3_8B, 1, 80),
    "mistral_7b": (MISTRAL_7B, 1, 80),
    "qlora_llama3_8b_24gb": (LLAMA3_8B, 1, 24),
    "qlora_zero3_70b_8x80gb": (LLAMA3_70B, 8, 80),
}
"""Model, GPUs and their memory in GiB, as each header says."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of recipes start there."""
    monkeypatch.chdir(REPOSITORY)


def loaded(name: str, *overrides: str) -> LoadedRecipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def header(name: str) -> str:
    """The comments above the first key, as one text."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text[: re.search(r"^[a-z]", text, re.MULTILINE).start()].splitlines()  # type: ignore[union-attr]
    return " ".join(" ".join(line.lstrip("# ") for line in lines).split())


def test_the_recipes_of_the_paper_are_there() -> None:
    assert set(LARGE) < set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("real_small", "retrain_router")])
def test_a_recipe_passes_every_check_of_its_keys(name: str) -> None:
    check_recipe(loaded(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_the_command_that_runs_the_file(name: str) -> None:
    command = re.search(r"deepspeed --num_accelerators (\d+) launch/train.py --config (\S+)", header(name))
    assert command is not None and command[2] == f"launch/recipes/{name}.yaml"
    check_world(loaded(name), int(command[1]))
    assert loaded(name).recipe.run.name == name


@pytest.mark.parametrize("name", LARGE)
def test_the_figures_of_the_paper_stand_in_the_recipe(name: str) -> None:
    recipe = loaded(name).recipe
    mixer, one, two = recipe.mixer, recipe.stage1, recipe.stage2
    assert (mixer.rank, mixer.alpha, mixer.dropout) == (64, 128, 0.1)
    for stage in (one, two):
        assert (stage.learning_rate, stage.scheduler, stage.warmup_ratio) == (1e-5, "cosine", 0.1)
        assert stage.micro_batch_size == 1
    assert (two.top_k, two.rsl.alpha, two.rsl.entropy_weight, two.preserve.beta) == (3, 0.1, 0.05, 5e-5)
    assert recipe.data.domains and two.data.max_examples == 2000
    wanted = ("in", "x", "dt", "out") if name == "falcon_mamba_7b" else ("q", "k", "v", "o")
    assert mixer.targets == wanted


@pytest.mark.parametrize("name", ["llama3_8b", "mistral_7b", "qlora_llama3_8b_24gb"])
def test_a_step_has_the_rows_that_the_header_says(name: str) -> None:
    for ranks in (1, 2, 4):
        check_world(loaded(name), ranks)
    with pytest.raises(UserError, match="global_batch_size"):
        check_world(loaded(name), 8)
    check_world(loaded(name, "stage1.global_batch_size=8", "stage2.global_batch_size=8"), 8)


@pytest.mark.parametrize("name", LARGE)
def test_the_data_of_a_large_recipe_are_hub_ids_and_none_is_tested_on_what_it_trains_on(name: str) -> None:
    domains = loaded(name).recipe.data.domains
    assert [domain.name for domain in domains] == ["medqa", "cola", "sst2", "gsm8k", "arc_easy", "humaneval"]
    for domain in domains:
        assert is_on_hub(domain.train) and domain.test is not None and is_on_hub(domain.test)
        assert domain.test != domain.train or domain.split_test not in domain.split_train


@pytest.mark.parametrize("name", sorted(CLUSTERS))
def test_the_plan_fits_and_has_the_peak_that_the_header_names(name: str, tmp_path: Path) -> None:
    config, ranks, memory = CLUSTERS[name]
    config.save_pretrained(tmp_path)
    peak = planned(name, tmp_path, ranks, memory)
    said = re.search(r"Planned, not run: (\d+) GB", header(name))
    assert said is not None and peak == pytest.approx(int(said[1]) * 1e9, abs=1e9)


def test_several_24_gb_cards_take_the_ds_config_of_the_header(tmp_path: Path) -> None:
    LLAMA3_8B.save_pretrained(tmp_path)
    file = re.search(r"deepspeed\.config=(\S+\.json)", header("qlora_llama3_8b_24gb"))
    assert file is not None
    alone = planned("qlora_llama3_8b_24gb", tmp_path, 1, 24)
    assert planned("qlora_llama3_8b_24gb", tmp_path, 4, 24, f"deepspeed.config={file[1]}") < alone


def planned(name: str, model: Path, ranks: int, memory: int, *overrides: str) -> int:
    """The peak of a rank, which fits."""
    recipe, _ = merge_ds_config(loaded(name, *overrides))
    base = recipe.recipe.base.model_copy(update={"model": str(model)})
    shape = model_shape(bare_base(base, packing=recipe.recipe.data.packing), recipe.recipe.mixer.targets)
    facts = PoolFacts(expert_names(recipe.recipe) or [])
    plan = make_plan(plan_request(recipe, shape, facts, Cluster(ranks, ranks, memory * 2**30)))
    assert plan.chosen.fits
    assert plan.zero_stage == (3 if "zero3" in name else plan.zero_stage)
    return plan.chosen.peak
