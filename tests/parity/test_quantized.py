"""A base in 4 bits: the same mathematics wherever experts and base are, and not a bit of the base changed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity.cases import Layout, four_bit, four_bit_cases
from support.comparing import Distance, distance, relative
from support.launching import TIMEOUT_SECONDS

from dsmixer import load_mixture
from dsmixer.config.recipe import load_recipe
from dsmixer.evaluation.methods import evaluate_mixture
from dsmixer.training.data import load_run_data

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

ONE, CUT = Layout(1, "replicate", 0), Layout(2, "weights", 3)
BFLOAT16 = Distance(loss=1e-3, grad_norm=1e-2, weights=0.5)
"""What a placement may change where products run in bfloat16: gradients are added up in another order, and a
float32 weight that changes in its last bit may round to the next bfloat16. Seen: 1.3e-4, 1.6e-3 and 0.31."""
ALL = [case.name for case in four_bit_cases()]


def reference_of(name: str) -> str:
    return four_bit(ONE, name.split("_")[1]).name


@pytest.mark.parametrize("name", [n for n in ALL if n != reference_of(n)])
def test_placement_changes_neither_losses_nor_norms_nor_weights(runs: Any, name: str) -> None:
    """Both stages, clipping at work, wide routers, weights cut by ZeRO-3 however small they are."""
    reference = reference_of(name)
    apart = distance(runs[name], runs[reference], runs.start(reference))
    print(f"{name}: {apart}")
    if "bfloat16" in name:
        assert apart.within(BFLOAT16.loss, BFLOAT16.grad_norm, BFLOAT16.weights), str(apart)
    else:
        assert apart.within(), str(apart)


@pytest.mark.parametrize("name", ALL)
def test_the_base_keeps_every_bit_and_experts_and_routers_move(runs: Any, name: str) -> None:
    """Packed weights, scales, embeddings and norms after both stages, and after an evaluation where the run
    made one, are those that bitsandbytes makes of the checkpoint."""
    run, seen = runs[name], runs[name].observed()
    assert seen["frozen_changed"] == []
    # 21 tensors of the base; 4 more for each of 14 packed layers: scales, codes, and those of the scales
    assert len(seen["frozen"]) == 21 + 14 * 5, seen["frozen"]
    assert seen["class_of_base"] == ["FrozenLinear4bit"]
    assert seen["trained_dtypes"] == ["torch.float32"]
    assert seen["frozen_dtypes"] == [f"torch.{name.split('_')[1]}"]
    trained, start = run.tensors(2), runs.start(name)
    assert trained.keys() == start.keys()
    assert not any(torch.equal(tensor, start[key]) for key, tensor in trained.items())


SPECIAL = {
    "fp4": four_bit(CUT, kind="fp4").name,
    "gpt2": f"gpt2_{four_bit(CUT).name}",
    "imported": f"{four_bit(CUT).name}_imported",
}


@pytest.mark.parametrize("name", SPECIAL.values(), ids=SPECIAL.keys())
def test_other_kinds_of_packing_of_models_and_of_experts_train_alike_when_zero3_cuts_them(
    runs: Any, name: str
) -> None:
    """FP4 with scales in 32 bits, GPT-2's transposed layers, and stage two over imported adapters."""
    reference = name.replace(CUT.name, ONE.name)
    apart = distance(runs[name], runs[reference], runs.start(reference))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)
    for run in (runs[name], runs[reference]):
        assert run.observed()["frozen_changed"] == []
        assert run.observed()["class_of_base"] == ["FrozenLinear4bit"]


def test_packings_differ_from_each_other_and_from_the_base_in_its_own_type(runs: Any) -> None:
    """Otherwise the tests above would prove less than they say."""
    fp4, nf4, none = (runs[n].column("loss", 1)[:3] for n in (SPECIAL["fp4"], four_bit(CUT).name, "w1z0"))
    print(f"losses of stage one: nf4 {nf4.tolist()}, fp4 {fp4.tolist()}, unpacked {none.tolist()}")
    assert relative(fp4, nf4) > 1e-4 and relative(nf4, none) > 1e-4


def test_imported_experts_keep_their_weights_on_a_base_in_4_bits(runs: Any) -> None:
    """Frozen ones: only the routers move."""
    run, source = runs[SPECIAL["imported"]], runs[four_bit(CUT).name]
    live, trained = run.live(), source.tensors(2)
    banks = [key for key in live if ".bank." in key]
    assert len(banks) == 16
    assert all(torch.equal(live[key][:, :4], trained[key][:, :4]) for key in banks if key.endswith("lora_A"))
    assert run.tensors(2).keys() == live.keys() - set(banks)


def test_layers_that_are_run_again_train_the_same(runs: Any) -> None:
    """Activation checkpointing under ZeRO-3, where packed weights are gathered once more."""
    plain = four_bit(CUT).name
    apart = distance(runs[f"{plain}_checkpointed"], runs[plain], runs.start(plain))
    print(f"checkpointed: {apart}")
    assert apart.within(), str(apart)
    assert runs[f"{plain}_checkpointed"].observed()["frozen_changed"] == []


EVALUATED = [four_bit(CUT).name, four_bit(Layout(2, "tokens", 3, 2)).name]


def scores(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    return {(row["domain"], row["method"], row["metric"]): row["value"] for row in rows}


@pytest.mark.parametrize("name", EVALUATED)
def test_a_base_that_is_cut_is_evaluated_as_a_whole_one(runs: Any, name: str) -> None:
    ours, theirs = (
        scores(json.loads((runs[n].folder / "evaluated.json").read_text()))
        for n in (name, reference_of(name))
    )
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-4), key


def test_a_published_mixture_is_loaded_on_the_base_that_it_was_trained_on(runs: Any) -> None:
    """In 4 bits again, from the folder alone, and it answers as the live model did; or unpacked if told."""
    name = four_bit(CUT).name
    model, tokenizer = load_mixture(runs[name].folder / "mixture")
    described = json.loads((runs[name].folder / "mixture" / "mixer_config.json").read_text())["base"]
    assert (described["quantization"], described["double_quantization"]) == ("nf4", True)
    loaded = load_recipe(*runs.recipe(name)).recipe
    domains = load_run_data(loaded, None).domains
    tested = [replace(domain, test=domain.train[:4]) for domain in domains]
    settings = loaded.evaluation.model_copy(update={"exact_match": False})
    found = scores(evaluate_mixture(model, tokenizer, tested, settings)["rows"])
    live = scores(json.loads((runs[name].folder / "evaluated.json").read_text()))
    assert len(found) > 10 and all(
        live[key] == pytest.approx(value, rel=1e-4) for key, value in found.items()
    )
    plain, _ = load_mixture(runs[name].folder / "mixture", quantization="none")
    unpacked = scores(evaluate_mixture(plain, tokenizer, tested, settings)["rows"])
    assert max(abs(unpacked[key] - value) for key, value in found.items()) > 1e-3
