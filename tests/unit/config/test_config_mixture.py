"""A recipe that starts from a published mixture: what follows from it, and what contradicts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmixer.config.checks import check_recipe
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, dump_recipe, load_recipe, resolved_differences
from dsmixer.config.schema import ExpertSpec

Load = Callable[..., LoadedRecipe]
ALONE = "stage1: {enabled: false}\n"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A run's folder with the description of a mixture of three experts, two of a rank of their own."""
    mixer = {
        "targets": ["q", "v"],
        "experts": ["law", "chess", "math"],
        "rank": 64,
        "alpha": 128,
        "ranks": {"law": 4, "chess": 8, "math": 8},
        "alphas": {"law": 8, "chess": 16, "math": 2.5},
        "dropout": 0.05,
        "rslora": True,
        "router": "per_block",
        "routing": "hard_soft",
        "top_k": 2,
        "renormalize": False,
        "top_p": 0.8,
    }
    folder = tmp_path / "run" / "mixture"
    folder.mkdir(parents=True)
    (folder / "mixer_config.json").write_text(json.dumps({"mixer": mixer}))
    return tmp_path / "run"


def written(mixture: Path, more: str = "") -> str:
    return f"mixer:\n  mixture: {mixture}\n{more}"


@pytest.mark.parametrize("inside", ["", "mixture"])
def test_everything_about_the_mixers_and_their_routing_comes_with_the_mixture(
    load: Load, mixture: Path, inside: str
) -> None:
    loaded = load(written(mixture / inside) + ALONE)
    check_recipe(loaded)
    mixer, stage2 = loaded.recipe.mixer, loaded.recipe.stage2
    assert mixer.experts == (
        ExpertSpec(name="law", rank=4, alpha=8.0),
        ExpertSpec(name="chess", rank=8, alpha=16.0),
        ExpertSpec(name="math", rank=8, alpha=2.5),
    )
    assert (mixer.targets, mixer.rslora, mixer.router, mixer.dropout) == (("q", "v"), True, "per_block", 0.05)
    assert (stage2.routing, stage2.top_k, stage2.renormalize, stage2.top_p) == ("hard_soft", 2, False, 0.8)


def test_what_stage_two_says_itself_stands(load: Load, mixture: Path) -> None:
    more = "  dropout: 0.0\nstage2: {routing: topk, top_k: 3, renormalize: true}\n"
    loaded = load(written(mixture, more))
    check_recipe(loaded)
    stage2 = loaded.recipe.stage2
    assert (stage2.routing, stage2.top_k, stage2.renormalize) == ("topk", 3, True)
    assert loaded.recipe.mixer.dropout == 0.0


def beside(mixture: Path, published: str, trained: str, used: str, enabled: str = "true") -> None:
    """A description that routes as ``published``, and the configuration of the run around it."""
    description = mixture / "mixture" / "mixer_config.json"
    changed = json.loads(description.read_text())
    changed["mixer"]["routing"] = published
    description.write_text(json.dumps(changed))
    stage2 = f"{{enabled: {enabled}, routing: {trained}, inference_routing: {used}}}"
    (mixture / "config.yaml").write_text(f"stage2: {stage2}\n")


@pytest.mark.parametrize(
    ("run", "more", "trains", "uses"),
    [
        # the mixture goes on as its run had it, whoever writes the first key again or does not
        (("topk", "soft", "topk"), "", "soft", "topk"),
        (("topk", "soft", "topk"), "stage2: {routing: soft}", "soft", "topk"),
        (("top_p", "topk", "top_p"), "", "topk", "top_p"),
        (("topk", "soft", "topk"), "stage2: {inference_routing: top_p}", "soft", "top_p"),
        # what is written stands
        (("topk", "soft", "topk"), "stage2: {routing: hard_soft}", "hard_soft", None),
        (("topk", "soft", "topk"), "stage2: {routing: soft, inference_routing: null}", "soft", None),
        # one key served both, the run trained no router, or its configuration is of another mixture
        (("soft", "soft", "null"), "", "soft", None),
        (("topk", "soft", "topk", "false"), "", "topk", None),
        (("hard_soft", "soft", "topk"), "", "hard_soft", None),
        (("topk", "sofft", "topk"), "", "topk", None),
    ],
)
def test_a_mixture_routes_in_use_as_it_was_published_and_trains_as_it_was_trained(
    load: Load, mixture: Path, run: tuple[str, ...], more: str, trains: str, uses: str | None
) -> None:
    beside(mixture, *run)
    for folder in (mixture, mixture / "mixture"):
        stage2 = load(written(folder, more)).recipe.stage2
        assert (stage2.routing, stage2.inference_routing) == (trains, uses)


def test_a_mixture_away_from_its_run_trains_as_it_routes_in_use(
    load: Load, mixture: Path, tmp_path: Path
) -> None:
    beside(mixture, "topk", "soft", "topk")
    alone = (mixture / "mixture").rename(tmp_path / "alone")
    stage2 = load(written(alone)).recipe.stage2
    assert (stage2.routing, stage2.inference_routing) == ("topk", None)


def test_the_resolved_configuration_says_it_all_and_is_read_where_the_mixture_is_gone(
    load: Load, mixture: Path, tmp_path: Path
) -> None:
    recipe = load(written(mixture) + ALONE).recipe
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_recipe(recipe))
    again = load_recipe(saved)
    check_recipe(again)
    assert again.recipe == recipe
    description = mixture / "mixture" / "mixer_config.json"
    changed = json.loads(description.read_text())
    changed["mixer"]["experts"] = ["law", "chess", "code"]
    description.write_text(json.dumps(changed))
    assert resolved_differences(saved.read_text(), load(written(mixture) + ALONE).recipe)
    description.unlink()
    assert load_recipe(saved).recipe == recipe


CONTRADICTIONS = [
    ("  rank: 16\n", "mixer.rank", "16 is written, and the mixture has 8"),
    ("  alpha: 3\n", "mixer.alpha", "3.0 is written, and the mixture has 16.0"),
    ("  rslora: false\n", "mixer.rslora", "False is written, and the mixture has True"),
    (
        "  router: per_projection\n",
        "mixer.router",
        "per_projection is written, and the mixture has per_block",
    ),
    ("  targets: [q]\n", "mixer.targets", "['q'] is written, and the mixture has ['q', 'v']"),
    (
        "  experts: [{name: law}, {name: chess}]\n",
        "mixer.experts",
        "law, chess is written, and the mixture has",
    ),
    (
        "  experts: [{name: law}, {name: chess, rank: 9}, {name: math}]\n",
        "mixer.experts.1.rank",
        "9 is written, and the mixture has 8",
    ),
    (
        "  experts: [{name: law, path: adapters/law}, {name: chess}, {name: math}]\n",
        "mixer.experts.0.path",
        "adapters/law is written, and the mixture has None",
    ),
]


@pytest.mark.parametrize(("more", "key", "problem"), CONTRADICTIONS, ids=[case[1] for case in CONTRADICTIONS])
def test_what_says_otherwise_than_the_mixture_is_refused_and_both_are_named(
    load: Load, mixture: Path, more: str, key: str, problem: str
) -> None:
    with pytest.raises(UserError) as refused:
        check_recipe(load(written(mixture, more) + ALONE))
    assert problem in refused.value.problem and "mixer_config.json" in refused.value.problem
    assert refused.value.where.endswith(key)


def test_what_says_the_same_is_no_contradiction(load: Load, mixture: Path) -> None:
    more = (
        "  rslora: true\n  targets: [q, v]\n  experts: [{name: law, rank: 4}, {name: chess}, {name: math}]\n"
    )
    check_recipe(load(written(mixture, more) + ALONE))


WRONG = [
    ("mixer: {mixture: /no/such/mixture}\n", "mixer.mixture", "is no folder"),
    ("mixer: {transfer: true}\n", "mixer.transfer", "none is named"),
    (
        "stage2: {routers: [law]}\n",
        "stage2.routers",
        "nothing would ever train the rows of the other experts",
    ),
    ("stage2: {routers: []}\n", "stage2.routers", "no row of the routers would train"),
    ("stage2: {routers: [lawe]}\n", "stage2.routers", "no expert is called 'lawe'"),
]


@pytest.mark.parametrize(("more", "key", "problem"), WRONG, ids=[case[2] for case in WRONG])
def test_a_mixture_or_rows_that_can_not_be_are_refused(load: Load, more: str, key: str, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        check_recipe(load(more))
    assert problem in refused.value.problem and refused.value.where.endswith(key)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"mixer": {}}', '{"mixer": {"experts": [".."]}}', '{"mixer": 3}']
)
def test_a_description_that_is_none_is_one_message(load: Load, mixture: Path, text: str) -> None:
    (mixture / "mixture" / "mixer_config.json").write_text(text)
    with pytest.raises(UserError, match="is no description of a mixture"):
        check_recipe(load(written(mixture) + ALONE))


def test_experts_without_a_domain_stay_as_they_are_and_stage_one_may_train_the_others(
    load: Load, mixture: Path
) -> None:
    """The recipe has domains for two of the three experts."""
    check_recipe(load(written(mixture) + "stage2: {experts: frozen, routers: [math]}\n"))
    with pytest.raises(UserError, match="no expert is called 'go'"):
        check_recipe(load(written(mixture), "data.domains.1.name=go"))
