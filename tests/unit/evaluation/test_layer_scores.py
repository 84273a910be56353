"""Scores of mixers against plain loops: experts whose B is scaled or zero, example by example, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.tiny import CONFIGS, byte_tokenizer
from transformers import AutoModelForSeq2SeqLM

from dsmixer.config.errors import UserError
from dsmixer.evaluation.layer_scores import (
    Probe,
    ablation,
    fewest,
    first_order,
    layers_of,
    methods,
    path_integral,
    ranking,
    size,
    units_of,
)
from dsmixer.evaluation.mixer_gates import without
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.model.inject import attach_mixers, route_to
from dsmixer.model.mixer_config import MixerConfig

EXPERTS = ["sums", "taste", "spare"]


@pytest.fixture
def domains(domains):
    """Three of them have test examples, few and of unequal lengths."""
    return [dataclasses.replace(domain, test=domain.test[2:6:2]) for domain in domains[:3]] + domains[3:]


@pytest.fixture
def probe_of(tokenizer, domains):
    """A probe of a mixture on the three domains that have test examples."""

    def make(mixture, batch_size=4):
        sheet = make_sheet(domains, tokenizer, max_length=96, max_examples=None)
        return Probe(mixture.model, sheet, batch_size, tokenizer.pad_token_id)

    return make


@pytest.fixture
def wide(make_mixture):
    """Four projections a layer, in float64 so that differences of losses have digits left."""
    mixture = make_mixture(targets=["q", "k", "v", "o"], experts=EXPERTS, rank=4, alpha=2, top_k=2)
    mixture.model.double()
    return mixture


def plain_loss(model, tokenizer, domains):
    """Mean over domains of the mean over target tokens, one example at a time, without padding."""
    means = []
    for domain in domains:
        total = count = 0
        for example in domain.test:
            prompt, completion = (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (example.prompt, example.completion)
            )
            ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            predicted = logits[len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(predicted, ids[len(prompt) :], reduction="sum"))
            count += len(completion) + 1
        if count:
            means.append(total / count)
    return sum(means) / len(means)


class Scaled:
    """The experts' B of some mixers times a number, for a while: the gate as a change of weights."""

    def __init__(self, mixture, factors):
        self.banks = {mixture.mixers[path].bank: factor for path, factor in factors.items()}

    def __enter__(self):
        self.before = {bank: bank.lora_B.detach().clone() for bank in self.banks}
        for bank, factor in self.banks.items():
            bank.lora_B.data.mul_(factor)

    def __exit__(self, *_):
        for bank, weight in self.before.items():
            bank.lora_B.data.copy_(weight)


@pytest.mark.parametrize("by", ["layer", "mixer"])
def test_ablation_is_the_rise_of_the_loss_with_those_experts_at_zero(by, wide, probe_of, tokenizer, domains):
    units = units_of(wide, by)
    found = ablation(probe_of(wide), units)
    assert len(found) == {"layer": 2, "mixer": 8}[by]
    full = plain_loss(wide.model, tokenizer, domains)
    for name, paths in units.items():
        with Scaled(wide, dict.fromkeys(paths, 0.0)):
            rise = plain_loss(wide.model, tokenizer, domains) - full
        assert found[name] == pytest.approx(rise, rel=1e-4, abs=1e-7)
    assert min(abs(rise) for rise in found.values()) > 1e-5


def test_first_order_is_the_slope_of_the_loss_in_the_experts_scale(wide, probe_of, tokenizer, domains):
    units, step = units_of(wide, "layer"), 1e-3
    found = first_order(probe_of(wide), units)
    for name, paths in units.items():
        ends = []
        for factor in (1 + step, 1 - step):
            with Scaled(wide, dict.fromkeys(paths, factor)):
                ends.append(plain_loss(wide.model, tokenizer, domains))
        assert found[name] == pytest.approx(-(ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_path_shares_out_what_all_mixers_bring(make_mixture, probe_of, tokenizer, domains):
    """The sum is base minus mixture; one unit's part is the integral of its slope, by many small steps."""
    mixture = make_mixture(targets=["q", "v", "o"], experts=EXPERTS, rank=4, alpha=0.1, routing="soft")
    mixture.model.double()
    units = units_of(mixture, "mixer")
    found = path_integral(probe_of(mixture), units)
    full = plain_loss(mixture.model, tokenizer, domains)
    with route_to(mixture.model, None):
        base = plain_loss(mixture.model, tokenizer, domains)
    total = sum(abs(score) for score in found.values())
    assert sum(found.values()) == pytest.approx(base - full, abs=1e-3 * total)
    own, step, points, integral = list(units)[2], 1e-3, 8, 0.0
    for point in range(points):
        at = (point + 0.5) / points
        ends = []
        for change in (step, -step):
            with Scaled(mixture, {path: at + change * (path == own) for path in units}):
                ends.append(plain_loss(mixture.model, tokenizer, domains))
        integral -= (ends[0] - ends[1]) / (2 * step) / points
    assert found[own] == pytest.approx(integral, abs=0.01 * total)


def test_size_is_the_experts_part_of_a_projection_over_all_tokens(wide, probe_of, tokenizer, domains):
    found = size(probe_of(wide), units_of(wide, "mixer"))
    sums = {path: [0.0, 0.0] for path in wide.mixers}
    handles = []
    for path, mixer in wide.mixers.items():

        def add(module, given, out, path=path, base=mixer.base):
            plain = torch.nn.functional.linear(given[0], base.weight)
            sums[path][0] += float((out - plain).square().sum())
            sums[path][1] += float(plain.square().sum())

        handles.append(mixer.register_forward_hook(add))
    plain_loss(wide.model, tokenizer, domains)
    for handle in handles:
        handle.remove()
    assert found == pytest.approx({path: math.sqrt(a / b) for path, (a, b) in sums.items()}, rel=1e-4)


@pytest.mark.parametrize("method", list(methods))
def test_batches_and_their_padding_change_no_score(method, wide, probe_of):
    units = units_of(wide, "layer")
    one, many = (methods[method](probe_of(wide, batch_size), units) for batch_size in (1, 7))
    assert many == pytest.approx(one, rel=1e-5, abs=1e-8)
    assert ranking(one) == ranking(many)


def test_a_mixer_that_was_taken_out_is_back_afterwards(wide, probe_of):
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = wide.model(ids).logits
        with route_to(wide.model, None):
            base = wide.model(ids).logits
        with without(wide, wide.mixers):
            assert torch.equal(wide.model(ids).logits, base)
        assert torch.equal(wide.model(ids).logits, before)
    for method in methods.values():
        method(probe_of(wide), units_of(wide, "layer"))
    with torch.no_grad():
        assert torch.equal(wide.model(ids).logits, before)
    assert not any(mixer.bank._forward_hooks or mixer.base._forward_hooks for mixer in wide.mixers.values())


def test_encoder_and_decoder_layers_are_units_of_their_own(domains):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS["t5"](), dtype=torch.float32).eval().double()
    mixture = attach_mixers(model, MixerConfig(["q", "v"], EXPERTS, rank=4, alpha=2))
    for mixer in mixture.mixers.values():
        torch.nn.init.normal_(mixer.bank.lora_B, std=0.3)
    tokenizer = byte_tokenizer(ends=True)
    sheet = make_sheet(domains, tokenizer, max_length=96, max_examples=None, decoder_start=0)
    probe = Probe(model.double(), sheet, 4, 0)
    units = units_of(mixture, "layer")
    assert list(units) == [f"encoder.block.{i}" for i in range(3)] + [f"decoder.block.{i}" for i in range(2)]
    found, full = ablation(probe, units), probe.loss()
    for name, paths in units.items():
        with Scaled(mixture, dict.fromkeys(paths, 0.0)):
            assert found[name] == pytest.approx(probe.loss() - full, rel=1e-6, abs=1e-9)
    slopes, step = first_order(probe, units), 1e-3
    for name in ("encoder.block.1", "decoder.block.0"):
        ends = []
        for factor in (1 + step, 1 - step):
            with Scaled(mixture, dict.fromkeys(units[name], factor)):
                ends.append(probe.loss())
        assert slopes[name] == pytest.approx(-(ends[0] - ends[1]) / (2 * step), rel=1e-2)
    assert set(size(probe, units)) == set(units)


def test_layers_are_named_up_to_their_number():
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "transformer.h.11.c_attn"]
    assert layers_of([*paths, "lm_head"]) == {
        "model.layers.0": paths[:2],
        "transformer.h.11": paths[2:],
        "lm_head": ["lm_head"],
    }


def test_the_fewest_units_within_a_rise_are_found_and_measured(wide, probe_of):
    """Every number of units by plain counting; the ranking is such that more of them never do worse."""
    probe, units = probe_of(wide), units_of(wide, "layer")
    full = probe.loss()
    rises = {name: probe.loss(paths) - full for name, paths in units.items()}
    order = sorted(units, key=lambda name: -rises[name])
    nothing = probe.loss(list(wide.mixers)) - full
    assert rises[order[1]] < nothing, "one layer alone does better than none"
    between = (rises[order[1]] + nothing) / 2
    kept, loss = fewest(probe, units, order, between)
    assert kept == order[:1] and loss - full == pytest.approx(rises[order[1]], abs=1e-9)
    with pytest.raises(UserError, match="nothing would be left"):
        fewest(probe, units, order, nothing + 1e-6)
    with pytest.raises(UserError, match="nothing to prune"):
        fewest(probe, units, order, rises[order[1]] - 1e-6)
