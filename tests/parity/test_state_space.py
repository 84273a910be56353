"""Mamba, Falcon-Mamba and Mamba-2 with experts on each of their projections, trained by the real launcher."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.cases import Layout, four_bit_scans, state_space_layouts
from support.comparing import WEIGHTS, distance, moved_share, relative
from support.launching import TIMEOUT_SECONDS
from support.merged_experts import MergedExperts
from support.oracles import PlainStageTwo
from support.tiny import STATE_SPACE

from dsmixer import load_mixture
from dsmixer.config.recipe import load_recipe
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.training.data import load_run_data

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

PLACED = [(kind, layout.name) for kind in STATE_SPACE for layout in state_space_layouts(kind)]
REFERENCE = Layout(2, "replicate", 2).name
CUT = Layout(2, "weights", 3).name


@pytest.mark.parametrize("kind", STATE_SPACE)
def test_stage_one_equals_transformers_own_model_with_each_expert_in_its_weights(
    runs: Any, kind: str
) -> None:
    """Losses, gradient norms and weights after every step, with clipping at work: no module is changed there,
    so that nothing of ours is in the gradients of A and B."""
    run = runs[f"{kind}_{REFERENCE}"]
    recipe, overrides = runs.recipe(f"{kind}_{REFERENCE}")
    torch.set_num_threads(1)
    plain = MergedExperts(recipe, overrides, kind)
    losses, grad_norms, apart, clipped = [], [], 0.0, 0
    assert plain.config.clip is not None
    start = {key: t for key, t in runs.start(f"{kind}_{REFERENCE}").items() if ".bank." in key}
    for step in range(len(plain.steps)):
        loss, norms, _ = plain.run_step(step)
        losses.append(loss)
        clipped += sum(norm > plain.config.clip for norm in norms.values())
        grad_norms.append(sum(norm**2 for norm in norms.values()) ** 0.5)
        apart = max(apart, moved_share(run.tensors(1, step=step + 1), plain.weights(start), start))
    loss_apart = relative(run.column("loss", 1), torch.tensor(losses, dtype=torch.float64))
    norm_apart = relative(run.column("grad_norm", 1), torch.tensor(grad_norms, dtype=torch.float64))
    print(f"{kind}: loss {loss_apart:.1e} grad_norm {norm_apart:.1e} weights {apart:.1e}; {clipped} clipped")
    assert len(start) == 2 * 2 * len(STATE_SPACE[kind])
    assert clipped
    assert loss_apart < 1e-5 and norm_apart < 1e-4 and apart < WEIGHTS


@pytest.mark.parametrize("kind", STATE_SPACE)
def test_stage_two_equals_autograd_of_task_rsl_and_preserve_in_one_process(runs: Any, kind: str) -> None:
    run = runs[f"{kind}_{REFERENCE}"]
    torch.set_num_threads(1)
    plain = PlainStageTwo(*runs.recipe(f"{kind}_{REFERENCE}"), run.tensors(1))
    start, apart = plain.weights(), {"weights": 0.0}
    for step, row in enumerate(row for row in run.rows if row["stage"] == 2):
        for key, value in plain.run_step(step).items():
            if key != "preserve" or step:
                apart[key] = max(apart.get(key, 0.0), abs(row[key] - value) / abs(value))
        share = moved_share(run.tensors(2, step=step + 1), plain.weights(), start)
        apart["weights"] = max(apart["weights"], share)
    print(f"{kind}: " + " ".join(f"{key} {value:.1e}" for key, value in apart.items()))
    assert max(apart["task_loss"], apart["rsl"], apart["routing_entropy"]) < 1e-5
    assert apart["grad_norm"] < 1e-4 and apart["preserve"] < 1e-3 and apart["weights"] < WEIGHTS


@pytest.mark.parametrize(("kind", "layout"), [case for case in PLACED if case[1] != REFERENCE])
def test_placement_changes_neither_losses_nor_norms_nor_weights(runs: Any, kind: str, layout: str) -> None:
    """Among them weights that a mixer reads outside the layer that owns them, cut by ZeRO-3: those of the
    convolution, and the bias of the time step; and layers that are run again in the backward pass, in runs
    that a signal stops in both stages and that are taken up again."""
    name, reference = f"{kind}_{layout}", f"{kind}_{REFERENCE}"
    apart = distance(runs[name], runs[reference], runs.start(reference))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)
    assert runs[name].observed()["frozen_changed"] == []


@pytest.mark.parametrize("kind", four_bit_scans())
def test_a_base_in_4_bits_trains_alike_when_zero3_cuts_it(runs: Any, kind: str) -> None:
    one, cut = (runs[f"{kind}_nf4_{layout}"] for layout in (REFERENCE, CUT))
    apart = distance(cut, one, runs.start(f"{kind}_nf4_{REFERENCE}"))
    print(f"{kind}: {apart}")
    assert apart.within(), str(apart)
    for run in (one, cut):
        assert run.observed()["frozen_changed"] == []
        assert run.observed()["class_of_base"] == ["FrozenLinear4bit"]
    unpacked = runs[f"{kind}_{REFERENCE}"]
    assert relative(one.column("loss", 1), unpacked.column("loss", 1)) > 1e-4


def scores(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    return {(row["domain"], row["method"], row["metric"]): row["value"] for row in rows}


@pytest.mark.parametrize("kind", STATE_SPACE)
def test_a_published_mixture_scores_as_the_live_one_cut_by_zero3_did(runs: Any, kind: str) -> None:
    """Loss and generated answers of base, experts and mixture, from the folder alone."""
    run = runs[f"{kind}_{CUT}"]
    live = scores(json.loads((run.folder / "evaluated.json").read_text()))
    model, tokenizer = load_mixture(run.folder / "mixture")
    loaded = load_recipe(*runs.recipe(f"{kind}_{CUT}")).recipe
    domains = load_run_data(loaded, None).domains
    tested = [replace(domain, test=domain.train[:4]) for domain in domains]
    settings = loaded.evaluation.model_copy(update={"generate_max_new_tokens": 2})
    found = scores(evaluate_mixture(model, tokenizer, tested, settings)["rows"])
    assert found.keys() == live.keys() and len(live) > 20
    for key, value in live.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key
