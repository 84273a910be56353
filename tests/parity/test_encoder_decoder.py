"""T5 and Flan-T5's shape through both stages, in every placement.

The oracles of ``test_stage_one_oracle`` and ``test_stage_two_oracle`` hold runs of theirs to PEFT and to
plain autograd with T5's own loss; here layouts are held to each other, and what a run leaves to what trained.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.cases import LONG, SIDES_SHORT, Layout
from peft import AutoPeftModelForSeq2SeqLM, PeftModel
from support.comparing import distance
from support.launching import TIMEOUT_SECONDS
from support.oracles import Steps
from transformers import AutoModelForSeq2SeqLM

import dsmixer.peft  # noqa: F401
from dsmixer import load_mixture, route_to
from dsmixer.config.recipe import load_recipe
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.training.data import load_run_data

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

CUT, SPREAD = Layout(2, "weights", 3), Layout(2, "tokens", 1, 2)
FIRST, *OTHERS = (f"t5_{layout.name}" for layout in SIDES_SHORT)
PAIRS = [
    *((name, FIRST) for name in OTHERS),
    *([(f"t5_block_{SPREAD.name}", f"t5_block_{SIDES_SHORT[0].name}")] if LONG else []),
    (f"flan_nf4_{CUT.name}", f"flan_nf4_{SIDES_SHORT[0].name}"),
    (f"flan_nf4_{SPREAD.name}", f"flan_nf4_{SIDES_SHORT[0].name}"),
]
PUBLISHED = (FIRST, "t5_imported")


@pytest.mark.parametrize(("name", "reference"), PAIRS)
def test_placement_changes_neither_losses_nor_norms_nor_weights(runs: Any, name: str, reference: str) -> None:
    """Both stages, clipping at work, wide routers; once with a router a block and layers that run again."""
    apart = distance(runs[name], runs[reference], runs.start(reference))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)
    assert runs[name].observed()["frozen_changed"] == []


def test_the_runs_clip_and_their_routers_are_wide(runs: Any) -> None:
    """Otherwise the tests above would prove less than they say."""
    run = runs[FIRST]
    assert bool((run.column("grad_norm") > 0.5 * 4**0.5).any()), "with four units, one was clipped"
    assert bool((run.column("routing_entropy", 2) < 0.95 * torch.log(torch.tensor(3.0))).all())
    moved, start = run.tensors(2), runs.start(FIRST)
    assert moved.keys() == start.keys() and not any(torch.equal(t, start[key]) for key, t in moved.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_tokens_of_a_step_are_those_of_both_sides_and_targets_those_of_the_decoder(
    runs: Any, stage: int
) -> None:
    run, steps = runs[FIRST], Steps.of(*runs.recipe(FIRST), stage)
    rows = [row for row in run.rows if row["stage"] == stage]
    assert len(rows) == len(steps)
    for step, row in enumerate(rows):
        examples = steps[step]
        written = sum(ids.shape[1] - first for _, ids, first in examples)
        assert row["target_tokens"] == written
        assert row["tokens"] == sum(first for _, _, first in examples) + written
        assert all(ids[0, first - 1] == 2 == ids[0, -1] for _, ids, first in examples), "both sides end"


def _scores(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    return {(row["domain"], row["method"], row["metric"]): row["value"] for row in rows}


def _live_scores(runs: Any, name: str) -> dict[tuple[str, str, str], float]:
    return _scores(json.loads((runs[name].folder / "evaluated.json").read_text()))


@pytest.mark.parametrize("name", [name for name in OTHERS if "replicate" not in name])
def test_a_live_model_is_scored_alike_wherever_its_weights_are(runs: Any, name: str) -> None:
    """Held-out losses and written answers, with ZeRO-3 or the exchange at work in ``generate``."""
    ours, theirs = _live_scores(runs, name), _live_scores(runs, FIRST)
    assert ours.keys() == theirs.keys() and {metric for _, _, metric in ours} == {"loss", "exact_match"}
    assert all(ours[key] == pytest.approx(value, rel=1e-4) for key, value in theirs.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_mixture_scores_as_the_live_model_did(runs: Any, name: str) -> None:
    model, tokenizer = load_mixture(runs[name].folder / "mixture")
    recipe = load_recipe(*runs.recipe(name)).recipe
    domains = load_run_data(recipe, None).domains
    tested = [replace(domain, test=domain.train[:4]) for domain in domains]
    settings = recipe.evaluation.model_copy(update={"generate_max_new_tokens": 2})
    found = _scores(evaluate_mixture(model, tokenizer, tested, settings)["rows"])
    live = _live_scores(runs, name)
    assert found.keys() == live.keys() and len(found) > 20
    assert all(live[key] == pytest.approx(value, rel=1e-4) for key, value in found.items())


def test_what_a_run_published_opens_in_peft_with_the_same_logits(runs: Any) -> None:
    folder = runs[FIRST].folder / "mixture"
    ours, _ = load_mixture(folder)
    theirs = AutoPeftModelForSeq2SeqLM.from_pretrained(folder, dtype=ours.dtype).eval()
    draw = torch.Generator().manual_seed(0)
    given = {
        "input_ids": torch.randint(3, 260, (2, 9), generator=draw),
        "labels": torch.randint(3, 260, (2, 5), generator=draw),
    }
    with torch.no_grad():
        want = ours(**given).logits
        assert torch.equal(theirs(**given).logits, want)
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(**given).logits, want, atol=1e-3)


def test_each_published_expert_computes_the_same_in_peft(runs: Any) -> None:
    """On the encoder, the decoder and between the two."""
    folder = runs[FIRST].folder / "mixture"
    model, _ = load_mixture(folder)
    draw = torch.Generator().manual_seed(0)
    given = {
        "input_ids": torch.randint(3, 260, (2, 9), generator=draw),
        "labels": torch.randint(3, 260, (2, 5), generator=draw),
    }
    base = load_recipe(*runs.recipe(FIRST)).recipe.base.model
    apart, moved = 0.0, 0.0
    for name in ("sums", "words", "rare"):
        config = json.loads((folder / "experts" / name / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_2_SEQ_LM"
        plain = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            bare = plain(**given).logits
            theirs = PeftModel.from_pretrained(plain, folder / "experts" / name).eval()(**given).logits
            with route_to(model, name):
                ours = model(**given).logits
        apart = max(apart, float((ours - theirs).abs().max()))
        moved = max(moved, float((ours - bare).abs().max()))
    print(f"experts in PEFT: {apart:.1e} apart, {moved:.1e} from the base")
    assert apart < 1e-5 < 1e-2 < moved


def test_imported_experts_stay_as_they_were_and_the_routers_train(runs: Any) -> None:
    run, source = runs["t5_imported"], runs[FIRST]
    live, trained = run.live(), source.tensors(2)
    banks = [key for key in live if key.endswith("lora_A")]
    assert len(banks) == 4 * (3 + 2 * 2)
    assert all(torch.equal(live[key][:, :4], trained[key][:, :4]) for key in banks)
    routers, start = run.tensors(2), runs.start(FIRST)
    assert len(routers) == len(banks)
    assert not any(torch.equal(tensor, start[key]) for key, tensor in routers.items())
