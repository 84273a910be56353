"""Runs that start from a published mixture, under the launcher: what trains, and what keeps every bit.

One launch of two ranks. The mixture is made here, of a few experts that say something, with wide routers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparing import RunRecord, Tensors, distance
from support.launching import TIMEOUT_SECONDS, launch
from support.tiny import write_recipe
from transformers import AutoModelForCausalLM

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.adapters.pools import add_experts
from dsmixer.adapters.saved_mixture import read_mixture
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

DRIVER = Path(__file__).with_name("driver_runs.py")
EXPERTS, NEW = ["sums", "words"], "rare"
START = ("stage1.enabled=false", "stage2.experts=frozen", "stage2.weight_decay=0.1", "stage2.clip=0.05")
ROWS = (*START, f"stage2.routers=[{NEW}]", "checkpoint.every=1", "checkpoint.keep=10")
Z2, Z3 = (
    ("deepspeed.zero_stage=2", "placement.mode=replicate"),
    ("deepspeed.zero_stage=3", "placement.mode=weights"),
)
TOKENS = ("deepspeed.zero_stage=2", "placement.mode=tokens", "placement.expert_parallel_size=2")
CASES: list[dict[str, Any]] = [
    {"name": "rows_z2", "overrides": [*ROWS, *Z2]},
    {"name": "rows_z3", "overrides": [*ROWS, *Z3]},
    {"name": "rows_tokens", "overrides": [*ROWS, *TOKENS]},
    {"name": "rows_stopped_z2", "overrides": [*ROWS, *Z2], "stop_at": [[2, 4]]},
    {"name": "all_z2", "overrides": [*START, *Z2]},
    {"name": "both_z2", "overrides": [*Z2], "finish": True},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of the runs, and the mixture that they start from: two experts and a third, added."""
    folder = tmp_path_factory.mktemp("pools")
    recipe = write_recipe(folder)
    mixture = _mixture(folder)
    cases = [
        {**case, "recipe": str(recipe), "overrides": [f"mixer.mixture={mixture}", *case["overrides"]]}
        for case in CASES
    ]
    text = recipe.read_text()  # rank, alpha and width of routers come with the mixture
    recipe.write_text(text.replace("  rank: 4\n  alpha: 8\n", "").replace("  router_std: 0.2\n", ""))
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(DRIVER, [str(folder / "cases.json")], ranks=2).check()
    return folder / "runs", mixture


def _mixture(folder: Path) -> Path:
    base, pools = folder / "llama", []
    for name, experts in (("two", EXPERTS), ("one", [NEW])):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = MixerConfig(
            ["q", "k", "v", "o"], experts, rank=4, alpha=8, top_k=len(experts), router_std=0.2
        )
        mixture = attach_mixers(model, config)
        generator = torch.Generator().manual_seed(len(experts))
        with torch.no_grad():
            for _, parameter in mixture.expert_parameters():
                parameter.normal_(0.0, 0.1, generator=generator)
                parameter[:, 4:] = 0.0  # what only pads the rank
        pools.append(save_mixture(mixture, folder / name, base=str(base)))
    grown = add_experts(pools[0], {NEW: pools[1] / "experts" / NEW}, folder / "grown").folder
    return grown


def start_of(mixture: Path) -> Tensors:
    """The routers that the runs start from, by the names of a run."""
    return {f"{path}.router.weight": weight for path, weight in read_mixture(mixture).routers.items()}


@pytest.mark.parametrize("name", ["rows_z2", "rows_z3", "rows_tokens"])
def test_only_the_named_rows_of_the_routers_train_and_all_else_keeps_every_bit(
    made: tuple[Path, Path], name: str
) -> None:
    """With weight decay and clipping at work; experts, which are frozen, are those of the mixture."""
    runs, mixture = made
    run, start, saved = RunRecord(runs / name), start_of(mixture), read_mixture(mixture)
    trained = run.tensors(2)
    assert trained.keys() == start.keys() and len(run.steps(2)) == 6
    for key, weight_ED in trained.items():
        assert torch.equal(weight_ED[:2], start[key][:2]), key
        assert not torch.equal(weight_ED[2], start[key][2]), key
        for kind in ("exp_avg", "exp_avg_sq"):
            moment_ED = run.tensors(2, kind)[key]
            assert not moment_ED[:2].any() and moment_ED[2].any()
    if name == "rows_tokens":
        return  # the live banks of rank 0 are its own experts
    for key, live in run.live().items():
        if ".bank." in key:
            path, _, factor = key.partition(".bank.lora_")
            for e, expert in enumerate(saved.config.experts):
                pair = saved.pool.adapters[expert].pairs[path]
                wanted = pair.a_RD if factor == "A" else pair.b_OR.T
                assert torch.equal(live[e, :4], wanted)


@pytest.mark.parametrize("name", ["rows_z3", "rows_tokens"])
def test_where_the_experts_are_changes_nothing_about_the_rows(made: tuple[Path, Path], name: str) -> None:
    runs, mixture = made
    apart = distance(RunRecord(runs / name), RunRecord(runs / "rows_z2"), start_of(mixture))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)


def test_a_run_over_rows_that_is_stopped_goes_on_bit_for_bit(made: tuple[Path, Path]) -> None:
    runs, _ = made
    one, two = RunRecord(runs / "rows_stopped_z2"), RunRecord(runs / "rows_z2")
    assert one.rows == two.rows
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = one.tensors(2, kind), two.tensors(2, kind)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_norm_counts_only_what_trains(made: tuple[Path, Path]) -> None:
    """The first step of both runs has the same gradient; of it only the rows that train are in the norm."""
    runs, _ = made
    rows, whole = (RunRecord(runs / name).column("grad_norm", 2) for name in ("rows_z2", "all_z2"))
    losses = [RunRecord(runs / name).column("task_loss", 2)[0] for name in ("rows_z2", "all_z2")]
    assert losses[0] == losses[1] and 0.0 < rows[0] < 0.9 * whole[0]


def test_both_stages_go_on_from_a_mixture_and_publish_another(made: tuple[Path, Path]) -> None:
    """The experts of stage one start as the mixture's, and not anew."""
    runs, mixture = made
    before, after = read_mixture(mixture), read_mixture(runs / "both_z2" / "mixture")
    assert after.config.experts == before.config.experts and after.config.top_k == 2
    moved, size = [], []
    for name, adapter in before.pool.adapters.items():
        for path, pair in adapter.pairs.items():
            now = after.pool.adapters[name].pairs[path]
            moved.append(float((now.b_OR - pair.b_OR).norm()))
            size.append(float(pair.b_OR.norm()))
    assert all(0.0 < m < 0.5 * s for m, s in zip(moved, size, strict=True))
    routers = zip(before.routers.values(), after.routers.values(), strict=True)
    assert all(0.0 < (new - old).norm() < 0.5 * old.norm() for old, new in routers)
