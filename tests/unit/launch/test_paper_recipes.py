"""The paper's experiments: every file in every scale resolves to cells that pass all checks.

No network. The small forms read data and models beside the repository, which need not be there: files of
their names stand in for them, since what is checked are names, keys and values.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from support.launching import REPOSITORY

from dsmixer.compare.methods import check_methods
from dsmixer.compare.plan import Plan, check_plan, make_plan
from dsmixer.config.comparison import LoadedComparison, load_comparison
from dsmixer.config.recipe import expert_names, load_recipe
from dsmixer.data.readers import is_on_hub
from dsmixer.data.template import check_template

PAPER = REPOSITORY / "launch" / "recipes" / "paper"
NAMES = sorted(path.stem for path in PAPER.glob("*.yaml"))
SHARED = REPOSITORY.parent / "shared"
MIXTURES = ("runs/mistral_7b", *(f"runs/table5_transfer-source/cells/mixture/seed-{n}" for n in range(3)))
"""Run folders that Table 5 starts from."""

# what the issue of this project lists, by the number in a file's name
WANTED = {
    *(f"table{n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, "18_20", 21)),
    *(f"figure{n}" for n in (3, 4, 5, 6)),
    "a14",
}
VARIED = {"table4_lora_lego": (6, 12), "table7_commonsense": (32, 64), "table3_hub_loras": None}
"""Rank and alpha where they are not 64 and 128; None: those of ready-made adapters."""


@cache
def scales(name: str) -> tuple[str | None, ...]:
    return (None, *load_comparison(PAPER / f"{name}.yaml").scales)


CASES = [(name, scale) for name in NAMES for scale in scales(name)]


@pytest.fixture(scope="module", autouse=True)
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository, beside stand-ins of the data and models, with Table 5's mixtures."""
    top = tmp_path_factory.mktemp("tree")
    here = top / "repository"
    here.mkdir()
    (here / "launch").symlink_to(REPOSITORY / "launch")
    for path in shared_paths():
        stand_in = top / "shared" / path
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.mkdir() if path.startswith("models/") else stand_in.touch()
    experts = expert_names(load_recipe(REPOSITORY / "launch" / "recipes" / "mistral_7b.yaml").recipe)
    short = ["cola", "sst2", "qnli", "mnli"]
    for folder in MIXTURES:
        published(here / folder / "mixture", experts or [] if "mistral" in folder else short)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        yield here


def shared_paths() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in PAPER.glob("*.yaml")]
    return sorted({path for text in texts for path in re.findall(r"\.\./shared/([\w./-]+)", text)})


def published(folder: Path, experts: list[str]) -> None:
    """The description of a mixture as a run of these experts publishes it."""
    mixer = {
        "targets": ["q", "k", "v", "o"],
        "experts": experts,
        "rank": 64,
        "alpha": 128,
        "ranks": {},
        "alphas": {},
        "dropout": 0.1,
        "rslora": False,
        "router": "per_projection",
        "routing": "topk",
        "top_k": 3,
        "renormalize": True,
        "top_p": 0.9,
    }
    folder.mkdir(parents=True)
    (folder / "mixer_config.json").write_text(json.dumps({"mixer": mixer}))


@cache
def loaded(name: str, scale: str | None, *overrides: str) -> LoadedComparison:
    return load_comparison(Path("launch/recipes/paper") / f"{name}.yaml", scale, overrides)


@cache
def planned(name: str, scale: str | None) -> Plan:
    """The cells of one seed: another changes nothing but the seed."""
    return make_plan(loaded(name, scale, "comparison.seeds=[0]"))


def test_each_table_and_figure_has_a_file() -> None:
    assert {re.match(r"table\d+(_\d+)?|figure\d+|a14", name)[0] for name in NAMES} == WANTED  # type: ignore[index]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_every_cell_passes_every_check(name: str, scale: str | None) -> None:
    plan = planned(name, scale)
    check_plan(plan)
    check_methods(plan)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_has_the_command_of_each_scale_and_the_name_is_the_files(name: str) -> None:
    command = f"dsmixer compare launch/recipes/paper/{name}.yaml"
    lines = (PAPER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    said = {line.split("  # ")[0].strip("# ") for line in lines if line.startswith("#   ")}
    assert said == {command, *(f"{command} --scale {scale}" for scale in scales(name) if scale)}
    assert "small" in scales(name) and loaded(name, None).comparison.name == name


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_the_papers_figures_are_of_rows_and_columns_that_there_are(name: str, scale: str | None) -> None:
    comparison, plan = loaded(name, scale).comparison, planned(name, scale)
    domains = {domain.name for whole in plan.whole for domain in whole.loaded.recipe.data.domains}
    rows = {variant.label for variant in plan.variants} | {"base", "own", *comparison.methods}
    for figures in comparison.paper or ():
        assert set(figures.rows) <= rows
        for columns in figures.rows.values():
            assert set(columns) <= domains | set(comparison.measures) | {"average"}


@pytest.mark.parametrize("name", NAMES)
def test_the_full_form_is_the_papers_setting_on_data_of_the_hub(name: str) -> None:
    plan = planned(name, None)
    recipe = plan.whole[0].loaded.recipe
    changed = {change.key for variant in plan.variants for change in variant.changes}
    one, two = recipe.stage1, recipe.stage2
    if "stage2.learning_rate" not in changed:
        assert (one.learning_rate, two.learning_rate, two.scheduler, two.warmup_ratio) == (
            1e-5,
            1e-5,
            "cosine",
            0.1,
        )
    assert two.global_batch_size == 4 and two.micro_batch_size == 1
    if not changed & {"stage2.top_k", "stage2.rsl.alpha", "stage2.data.max_examples"}:
        assert two.top_k == min(3, len(expert_names(recipe) or []))
        assert (two.rsl.alpha, two.rsl.entropy_weight, two.preserve.beta) == (0.1, 0.05, 5e-5)
        assert two.data.max_examples == 2000
    wanted = VARIED.get(name, (64, 128))
    if wanted is not None and "mixer.rank" not in changed:
        assert (recipe.mixer.rank, recipe.mixer.alpha) == wanted
    for domain in recipe.data.domains:
        assert is_on_hub(domain.train)
        for template in (domain.template, domain.template_test):
            if template is not None:
                check_template(template, domain.name)


@pytest.mark.parametrize("name", NAMES)
def test_the_small_form_has_three_seeds_in_float32_on_rows_of_256_tokens(name: str) -> None:
    comparison = loaded(name, "small").comparison
    assert len(comparison.seeds) == 3 or name == "table5_transfer"  # three mixtures, each from its own seed
    for whole in planned(name, "small").whole:
        recipe = whole.loaded.recipe
        assert recipe.base.model.startswith("../shared/models/") and recipe.data.max_length == 256
        assert recipe.base.dtype == "float32"
        assert recipe.mixer.rank <= 32 or recipe.mixer.mixture is not None


@pytest.mark.parametrize(("scale", "tasks"), [(None, ["qqp", "rte", "mrpc"]), ("small", ["qnli", "mnli"])])
def test_no_row_of_an_out_of_domain_task_is_trained_on(scale: str | None, tasks: list[str]) -> None:
    domains = {d.name: d for d in planned("table6_out_of_domain", scale).whole[0].loaded.recipe.data.domains}
    cola = domains["cola"]
    for task in tasks:
        domain = domains[task]
        assert (domain.train, domain.subset, domain.template) == (cola.train, cola.subset, cola.template)
        assert domain.expert == "cola" and domain.max_train == 10
        read = (domain.test, domain.subset_test, domain.template_test)
        assert read != (cola.test, cola.subset_test, cola.template_test)
        assert task in (domain.subset_test or domain.test or "")


def test_the_page_has_each_file_with_the_cells_of_its_small_form() -> None:
    page = (REPOSITORY / "docs" / "experiments.md").read_text(encoding="utf-8")
    told = {match[1]: int(match[2]) for match in re.finditer(r"\| `(\w+)` \|.*\| (\d+) \| [^|]* \|\n", page)}
    cells = {}
    for name in NAMES:
        seeds = len(loaded(name, "small").comparison.seeds)
        cells[name] = len(planned(name, "small").cells) * seeds
    assert told == cells


@pytest.mark.skipif(not SHARED.is_dir(), reason="no data beside the repository: ../shared")
def test_the_data_and_models_of_the_small_forms_are_there() -> None:
    assert [path for path in shared_paths() if not (SHARED / path).exists()] == []


def test_the_cross_domain_questions_are_whole_records() -> None:
    lines = (PAPER / "cross_domain.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["prompt"] for record in records}) == 36
    assert all(record["completion"].strip() for record in records)
