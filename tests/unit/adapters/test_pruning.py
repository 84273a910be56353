"""Pruned mixtures: what is left computes what it did, and what is gone costs nothing."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.tiny import STATE_SPACE, write_base
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import dsmixer.peft  # noqa: F401
from dsmixer.adapters.importing import import_adapters
from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.mixture_folder import read_description, save_mixture
from dsmixer.adapters.pools import remove_experts, rename_experts
from dsmixer.adapters.pruning import num_weights, prune_mixture
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.model.inject import attach_mixers, mixture_of, route_to
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.mixer_config import MixerConfig

LLAMA = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"]


@pytest.fixture
def pruned(make_mixture, base_folder, tmp_path):
    """A saved mixture, loaded, and the folder of what is left of it with some of its mixers."""

    def make(keep, kind="llama", **options):
        source = save_mixture(make_mixture(kind, **options), tmp_path / "full", base=str(base_folder(kind)))
        model, _ = load_mixture(source)
        mixture = mixture_of(model)
        kept = [path for path in mixture.mixers if keep(path)]
        return mixture, kept, prune_mixture(mixture, source, kept, tmp_path / "less")

    return make


def logits_of(model, ids, expert=..., **given):
    with torch.no_grad():
        if expert is ...:
            return model(ids, **given).logits
        with route_to(model, expert):
            return model(ids, **given).logits


def with_zeros(mixture, kept, ids, expert=..., **given):
    """Logits of the whole mixture where the experts of all but ``kept`` put out zeros."""
    handles = [
        mixer.bank.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        for path, mixer in mixture.mixers.items()
        if path not in kept
    ]
    found = logits_of(mixture.model, ids, expert, **given)
    for handle in handles:
        handle.remove()
    return found


CASES = {
    "a layer": ("llama", lambda path: "layers.1" in path, {}),
    "some projections": ("llama", lambda path: path in LLAMA[1:6], {"routing": "soft"}),
    "a block in part, its router's owner gone": (
        "llama",
        lambda path: not path.endswith("q_proj"),
        {"router": "per_block"},
    ),
    "one of a block": ("llama", lambda path: path.endswith("v_proj"), {"router": "per_block"}),
    "fused": ("gpt2", lambda path: "h.0" in path or "c_proj" in path, {}),
    "rslora": ("phi3", lambda path: "layers.0" in path, {"rslora": True, "routing": "top_p", "top_p": 0.7}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_pruned_mixture_is_the_whole_one_with_those_experts_at_zero(case, pruned, token_ids):
    kind, keep, options = CASES[case]
    mixture, kept, written = pruned(keep, kind, **options)
    less, _ = load_mixture(written.folder)
    for expert in (..., "law", "chess", None):
        wanted = with_zeros(mixture, kept, token_ids, expert)
        assert torch.equal(logits_of(less, token_ids, expert), wanted)
    moved = logits_of(less, token_ids) - logits_of(mixture.model, token_ids)
    assert moved.abs().max() > 1e-3, "what was pruned had said something"


def test_what_is_gone_is_the_bases_own_module_and_in_no_file(pruned, token_ids):
    mixture, kept, written = pruned(lambda path: path in LLAMA[4:6])
    less, _ = load_mixture(written.folder)
    mixed = [path for path, module in less.named_modules() if isinstance(module, MixedLinear)]
    assert mixed == kept == list(written.kept) == LLAMA[4:6]
    files = [written.folder / "routers.safetensors"]
    files += [written.folder / "experts" / name / "adapter_model.safetensors" for name in ("law", "chess")]
    for file in files:
        paths = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in load_file(file)}
        assert {path.removesuffix(".weight") for path in paths} == set(kept)
    # q and k of one layer: two routers of 2 x 32, ranks 4 and 6 over 32 to 32 and 32 to 16
    assert written.weights == 2 * 2 * 32 + (4 + 6) * (64 + 48) == num_weights(mixture_of(less))
    assert written.weights < num_weights(mixture)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_expert_that_is_left_computes_the_same_in_peft(kind, pruned, load_base, token_ids):
    _, _, written = pruned(lambda path: ".1." in path, kind)
    less, _ = load_mixture(written.folder)
    for name in ("law", "chess"):
        alone = peft.PeftModel.from_pretrained(load_base(kind), written.folder / "experts" / name).eval()
        layers = [
            path for path, module in alone.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
        ]
        assert len(layers) == {"llama": 4, "gpt2": 2}[kind]
        wanted = logits_of(less, token_ids, name)
        with torch.no_grad():
            torch.testing.assert_close(alone(token_ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_peft_opens_the_whole_of_it(pruned, load_base, token_ids):
    _, _, written = pruned(lambda path: "layers.0" in path)
    less, _ = load_mixture(written.folder)
    opened = peft.PeftModel.from_pretrained(load_base("llama"), written.folder).eval()
    with torch.no_grad():
        assert torch.equal(opened(token_ids).logits, logits_of(less, token_ids))


def test_a_recipe_may_start_from_it(pruned, base_folder, tmp_path):
    _, kept, written = pruned(lambda path: "layers.0" in path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {{model: {base_folder('llama')}}}\n"
        f"mixer: {{mixture: {written.folder}}}\n"
        "stage1: {enabled: false}\n"
        "data: {domains: [{name: law, train: law.jsonl}, {name: chess, train: chess.jsonl}]}\n"
    )
    assert list(load_recipe(path).recipe.mixer.targets) == kept


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_encoder_decoder_and_state_space_mixtures_are_pruned_too(kind, tmp_path):
    base = write_base(tmp_path / "base", kind)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    targets = STATE_SPACE.get(kind, ["q", "k", "v", "o"])
    mixture = attach_mixers(
        auto.from_pretrained(base, dtype=torch.float32).eval(),
        MixerConfig(targets, ["law", "chess", "math"], rank=4, alpha=8, router_std=0.3),
    )
    for mixer in mixture.mixers.values():
        torch.nn.init.normal_(mixer.bank.lora_B, std=0.3)
    source = save_mixture(mixture, tmp_path / "full", base=str(base))
    kept = [path for index, path in enumerate(mixture.mixers) if index % 3 == 1]
    written = prune_mixture(mixture, source, kept, tmp_path / "less")
    less, _ = load_mixture(written.folder)
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"decoder_input_ids": ids[:, :5]} if kind == "t5" else {}
    for expert in (..., "chess"):
        wanted = with_zeros(mixture, kept, ids, expert, **given)
        torch.testing.assert_close(logits_of(less, ids, expert, **given), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits_of(less, ids, **given), logits_of(mixture.model, ids, **given))
    renamed = rename_experts(written.folder, {"law": "rights"}, tmp_path / "renamed").folder
    for folder in (written.folder, renamed):
        assert ("is refused by PEFT in a mamba model" in (folder / "README.md").read_text()) == (
            kind == "mamba"
        )


def test_an_expert_without_weights_left_is_told_and_answers_as_the_base(
    load_base, base_folder, token_ids, tmp_path
):
    """Also where an adapter had its largest rank on a projection that is pruned."""
    folders = {}
    for name, options in (
        ("few", {"target_modules": ["q_proj"], "r": 4}),
        ("wide", {"target_modules": ["q_proj", "v_proj"], "r": 2, "rank_pattern": {"q_proj": 7}}),
    ):
        model = peft.get_peft_model(load_base("llama"), peft.LoraConfig(lora_alpha=6, **options))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    mixture = import_adapters(load_base("llama"), folders)
    source = save_mixture(mixture, tmp_path / "full", base=str(base_folder("llama")))
    kept = [path for path in mixture.mixers if path.endswith("v_proj")]
    written = prune_mixture(mixture, source, kept, tmp_path / "less")
    assert written.notes == ("The expert `few` has no weights left: it answers as the base does.",)
    assert written.notes[0] in (written.folder / "README.md").read_text()
    less, _ = load_mixture(written.folder)
    assert torch.equal(logits_of(less, token_ids, "few"), logits_of(less, token_ids, None))
    for expert in (..., "wide"):
        assert torch.equal(logits_of(less, token_ids, expert), with_zeros(mixture, kept, token_ids, expert))
    for name in folders:
        alone = peft.PeftModel.from_pretrained(load_base("llama"), written.folder / "experts" / name).eval()
        with torch.no_grad():
            wanted = logits_of(less, token_ids, name)
            torch.testing.assert_close(alone(token_ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_description_and_card_say_what_was_pruned_and_from_what(
    make_mixture, base_folder, load_base, token_ids, tmp_path
):
    """How the base was held while it was pruned is not how the mixture wants it; pools change afterwards."""
    facts = {"license": "apache-2.0"}
    base = str(base_folder("llama"))
    source = save_mixture(
        make_mixture("llama"), tmp_path / "runs" / "six" / "mixture", base=base, facts=facts
    )
    model, _ = load_mixture(source, dtype="bfloat16")
    units = {"model.layers.0": LLAMA[:4], "model.layers.1": LLAMA[4:]}
    mixture = mixture_of(model)
    written = prune_mixture(mixture, source, LLAMA[4:], tmp_path / "less", units=units, why="by hand")
    about, config = read_description(written.folder)
    assert about == read_description(source)[0] and about["dtype"] == "float32"
    assert list(config.targets) == LLAMA[4:]
    line = "pruned: mixers on 4 of the 8 projections of `six`, those of model.layers.1; "
    card = (written.folder / "README.md").read_text()
    assert line in card and "; by hand" in card and "\nlicense: apache-2.0\n" in card
    assert str(tmp_path) not in card.replace(base, "")
    history = json.loads((written.folder / "mixer_config.json").read_text())["history"]
    assert len(history) == 1 and history[0].startswith(line)
    again = remove_experts(written.folder, ["chess"], tmp_path / "again")
    history = json.loads((again.folder / "mixer_config.json").read_text())["history"]
    assert [text.split()[0] for text in history] == ["pruned:", "removed"]
    one, two = load_mixture(written.folder)[0], load_mixture(again.folder)[0]
    assert torch.equal(logits_of(one, token_ids, "law"), logits_of(two, token_ids))
    # a pruned mixture is a mixture: it is pruned again, and the card says both
    last = prune_mixture(mixture_of(one), written.folder, LLAMA[5:6], tmp_path / "least")
    assert (last.folder / "README.md").read_text().count("- pruned: mixers on") == 2


def test_nothing_left_nothing_pruned_and_nothing_known_are_refused(pruned, tmp_path):
    mixture, kept, written = pruned(lambda path: "layers.0" in path)
    source = tmp_path / "full"
    for wrong, reason in (
        ([], "nothing would be left"),
        (list(mixture.mixers), "nothing to prune"),
        ([*kept, "lm_head"], "no mixer on lm_head"),
    ):
        with pytest.raises(UserError, match=reason):
            prune_mixture(mixture, source, wrong, tmp_path / "out")
    for taken in (source, written.folder):
        with pytest.raises(UserError, match="something else is there already"):
            prune_mixture(mixture, source, kept, taken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "less"]
