"""The cells of a comparison: which experts are shared, and the recipe that each cell runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsmixer.compare.plan import Plan, check_plan, make_plan
from dsmixer.compare.state import check_unchanged, method_file, write_asked
from dsmixer.compare.variants import safe_name
from dsmixer.config.comparison import load_comparison
from dsmixer.config.errors import UserError

File = Callable[..., Path]
GMOE = "stage2.routing_loss: gmoe"


def planned(path: Path, *overrides: str, only: tuple[str, ...] = ()) -> Plan:
    return make_plan(load_comparison(path, None, overrides), only)


def kinds(plan: Plan) -> list[tuple[str, str, int]]:
    return [(cell.kind, cell.label if cell.kind == "variant" else "", cell.seed) for cell in plan.cells]


def test_where_answers_are_timed_each_variant_is_scored_once_more(comparison_file: File) -> None:
    plan = planned(comparison_file(), "comparison.measures=[seconds_per_example]", "comparison.seeds=[0]")
    timed = [cell for cell in plan.cells if cell.times is not None]
    assert [(cell.times, cell.label, cell.kind) for cell in timed] == [
        ("RSL", "mixture", "method"),
        ("GMoE", "mixture", "method"),
    ]
    for cell, variant in zip(timed, plan.cells[1:3], strict=True):
        assert cell.needs == variant.name and cell.folder == variant.folder
    assert len({cell.name for cell in plan.cells}) == len(plan.cells) == 7


def test_variants_that_differ_in_stage_two_alone_share_their_experts(comparison_file: File) -> None:
    plan = planned(comparison_file())
    one_seed = ["experts", "RSL", "GMoE", "method", "method"]
    assert [
        f"{kind} {label}".removeprefix("variant ").strip() for kind, label, _ in kinds(plan)
    ] == one_seed * 2
    experts, *others = plan.cells[:5]
    assert all(cell.needs == experts.name for cell in others)
    check_plan(plan)


def test_experts_train_without_stage_two_and_keep_its_examples_out(comparison_file: File) -> None:
    plan = planned(comparison_file())
    experts, rsl, gmoe, _ = plan.cells[:4]
    recipe = experts.recipe.recipe
    assert recipe.stage1.enabled and not recipe.stage2.enabled
    assert recipe.stage2.data.held_out == 30 and recipe.run.seed == 0
    assert recipe.evaluation.methods == ("base", "experts")
    for cell in (rsl, gmoe):
        own = cell.recipe.recipe
        assert not own.stage1.enabled and own.stage2.enabled and own.stage2.data.held_out == 30
        assert own.mixer.mixture == str(experts.folder / "mixture")
        assert own.evaluation.methods == ("mixture",)
        assert Path(own.run.dir) / own.run.name == cell.folder


def test_a_variant_s_loss_takes_the_place_of_the_file_s_rsl(comparison_file: File) -> None:
    _, rsl, gmoe, _ = planned(comparison_file()).cells[:4]
    assert rsl.recipe.recipe.stage2.rsl.alpha == 0.2 and rsl.recipe.recipe.stage2.routing_loss == "lora_mixer"
    assert gmoe.recipe.recipe.stage2.routing_loss == "gmoe"
    assert gmoe.recipe.recipe.stage2.rsl.ramp == 0.5, "the ramp is that of every loss"


@pytest.mark.parametrize(
    ("change", "num_trunks"),
    [
        ("mixer.rank: 16", 2),
        ("stage1.learning_rate: 0.1", 2),
        ("stage1.micro_batch_size: 2", 2),
        ("stage2.data.max_examples: 20", 2),
        ("stage2.top_k: 2", 1),
        ("checkpoint.every: 7", 1),
        ("mixer.compute: loop", 1),
        ("evaluation.batch_size: 3", 1),
    ],
)
def test_experts_are_shared_exactly_where_stage_one_is_the_same(
    comparison_file: File, change: str, num_trunks: int
) -> None:
    assert len(planned(comparison_file((GMOE, change))).trunks) == num_trunks


def test_sizes_of_router_data_share_their_experts_where_held_out_is_written(comparison_file: File) -> None:
    sizes = ("max_examples: 30", "max_examples: 30, held_out: 30")
    plan = planned(comparison_file((GMOE, "stage2.data.max_examples: 20"), sizes))
    assert len(plan.trunks) == 1
    small = plan.cells[2].recipe.recipe.stage2.data
    assert (small.max_examples, small.held_out) == (20, 30)


def test_experts_know_nothing_of_what_stage_two_says_wherever_it_stands(comparison_file: File) -> None:
    path = comparison_file()
    plain, told = planned(path), planned(path, "stage2.top_k=1", "stage2.renormalize=false")
    assert plain.cells[0].recipe.recipe == told.cells[0].recipe.recipe
    assert told.cells[1].recipe.recipe.stage2.top_k == 1 and plain.cells[1].recipe.recipe.stage2.top_k == 2


def test_axes_are_crossed_with_variants_and_change_keys_together(comparison_file: File) -> None:
    axes = (
        "axes: [{name: rank, key: mixer.rank, values: [2, 4], also: {mixer.alpha: [4, 8]}}, "
        "{name: K, key: stage2.top_k, values: [1, 2]}]"
    )
    plan = planned(comparison_file(("methods: [own", f"{axes}\n  methods: [own"), ("[own, uniform]", "[]")))
    labels = [variant.label for variant in plan.variants]
    assert labels[:4] == ["RSL, rank=2, K=1", "RSL, rank=2, K=2", "RSL, rank=4, K=1", "RSL, rank=4, K=2"]
    assert len(labels) == 8 and len(plan.trunks) == 2
    ranks = {(w.loaded.recipe.mixer.rank, w.loaded.recipe.mixer.alpha) for w in plan.whole}
    assert ranks == {(2, 4.0), (4, 8.0)}
    assert {cell.kind for cell in plan.cells} == {"experts", "variant"}


def test_axes_without_variants_name_their_points(comparison_file: File) -> None:
    axes = ("methods: [own", "axes: [{name: α, key: stage2.rsl.alpha, values: [0.1, 0.2]}]\n  methods: [own")
    text = comparison_file(axes).read_text()
    path = comparison_file()
    begin, end = text.index("  variants:"), text.index("  axes:")
    path.write_text(text[:begin] + text[end:])
    plan = planned(path)
    assert [variant.label for variant in plan.variants] == ["α=0.1", "α=0.2"]
    assert len({variant.folder for variant in plan.variants}) == 2


def test_ready_made_experts_make_each_variant_a_whole_run(comparison_file: File, tmp_path: Path) -> None:
    experts = f"[{{name: law, path: {tmp_path}}}, {{name: chess, path: {tmp_path}}}]"
    plan = planned(
        comparison_file(
            ("alpha: 16", f"alpha: 16, experts: {experts}"),
            ("stage2:\n", "stage1: {enabled: false}\nstage2:\n"),
        )
    )
    assert [cell.kind for cell in plan.cells] == ["variant", "variant", "method", "method"] * 2
    rsl, _, methods = plan.cells[:3]
    assert methods.needs == rsl.name and methods.folder == rsl.folder
    assert rsl.recipe.recipe.mixer.mixture is None
    assert rsl.recipe.recipe.evaluation.methods == ("base", "experts@stage1", "mixture")


def test_only_takes_variants_by_name(comparison_file: File) -> None:
    plan = planned(comparison_file(), only=("GMoE",))
    assert [label for kind, label, _ in kinds(plan) if kind == "variant"] == ["GMoE", "GMoE"]
    path = comparison_file((GMOE, "evaluation.batch_size: 3"))
    whole, part = planned(path), planned(path, only=("GMoE",))
    assert whole.cells[0].raw == part.cells[0].raw, "the experts are the same whoever asks for them"
    full = planned(comparison_file())
    assert {cell.name for cell in plan.cells} < {cell.name for cell in full.cells}, "the same folders"
    with pytest.raises(UserError, match="no variant is called 'GMOE'.*\n.*write GMoE"):
        planned(comparison_file(), only=("GMOE",))


def test_the_folder_is_that_of_the_comparison_its_scale_or_the_run_s_name(
    comparison_file: File, tmp_path: Path
) -> None:
    path = comparison_file()
    assert planned(path).folder == tmp_path / "runs" / "losses"
    assert make_plan(load_comparison(path, "small")).folder == tmp_path / "runs" / "losses-small"
    assert planned(path, "run.name=again").folder == tmp_path / "runs" / "again"


def test_names_become_one_folder_each_that_leads_nowhere_else() -> None:
    names = [
        "RSL",
        "a/b",
        "a-b",
        "a b",
        "../x",
        "..",
        ".",
        "-",
        "",
        "é",
        "è",
        "x" * 99,
        "x" * 98,
        "k=1,2",
        "a\nb",
    ]
    folders = [safe_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[0] == "RSL" and folders[2] == "a-b"
    for folder in folders:
        assert folder and "/" not in folder and not folder.startswith((".", "-")) and len(folder) < 80


def test_methods_that_were_scored_on_other_examples_are_not_taken_for_done(comparison_file: File) -> None:
    path = comparison_file()
    plan = planned(path)
    cell = next(cell for cell in plan.cells if cell.kind == "method")
    write_asked(plan, cell)
    scored = method_file(plan, cell)
    scored.write_text("{}")
    check_unchanged(plan)
    with pytest.raises(UserError, match="evaluation: .*'max_examples': 3.* here"):
        check_unchanged(planned(path, "evaluation.max_examples=3"))
