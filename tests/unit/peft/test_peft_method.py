"""The mixture by PEFT's own calls: the same model as ours, and what it can't be is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from support.peft_mixtures import SETTINGS, stir
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import dsmixer
import dsmixer.peft
from dsmixer import load_mixture, route_to, save_mixture
from dsmixer.cli.loading import find_mixture
from dsmixer.config.errors import UserError
from dsmixer.model.inject import mixture_of
from dsmixer.peft import MixerConfig


@torch.no_grad()
def logits(model, ids):
    model.eval()
    return model(input_ids=ids).logits


def bare(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_peft_knows_the_method_once_and_for_good():
    member = PeftType("DSMIXER")
    assert member is PeftType["DSMIXER"] is PeftType.DSMIXER is dsmixer.peft.extend_enum()
    assert list(PeftType).count("DSMIXER") == 1 and "DSMIXER" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member


@pytest.mark.parametrize(("version", "fits"), [("0.20.1", False), ("0.21.0", True), ("0.22.0", False)])
def test_another_version_of_peft_is_refused_by_name(version, fits):
    dsmixer.peft.check_version(peft.__version__)
    if fits:
        dsmixer.peft.check_version(version)
        return
    with pytest.raises(UserError, match=r"PEFT 0\.2\d.*\n.*pip install 'peft>=0.21,<0.22'"):
        dsmixer.peft.check_version(version)


def test_both_configurations_have_the_same_fields_with_the_same_defaults():
    ours = {field.name: field for field in dataclasses.fields(dsmixer.MixerConfig)}
    theirs = {field.name: field for field in dataclasses.fields(MixerConfig)}
    required = {"targets", "experts"}  # a dataclass of PEFT can't require what its parent does not
    for name in ours.keys() - required:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].default_factory == theirs[name].default_factory, name
    assert required < theirs.keys()
    with pytest.raises(UserError, match="at least one expert"):
        MixerConfig(targets=["q"])


def test_a_fresh_mixture_answers_as_the_base_and_disabled_always_does(made, base, ids):
    want = logits(bare(base), ids)
    assert torch.equal(logits(made(fresh=True), ids), want)
    model = made()
    assert not torch.allclose(logits(model, ids), want, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), want)
    assert model.get_model_status().enabled and not torch.equal(logits(model, ids), want)


def test_one_expert_answers_as_pefts_own_lora_with_its_weights(made, base, ids):
    model = made()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    want = get_peft_model(bare(base), lora)
    weights = {}
    for path, mixer in mixture_of(model).mixers.items():
        weights[f"base_model.model.{path}.lora_A.weight"] = mixer.bank.lora_A.data[1, :4]
        weights[f"base_model.model.{path}.lora_B.weight"] = mixer.bank.lora_B.data[1, :4].T
    assert not set_peft_model_state_dict(want, weights).unexpected_keys
    with route_to(model, "chess"):
        torch.testing.assert_close(logits(model, ids), logits(want, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", ["experts", "routers", "both"])
def test_what_is_asked_for_trains_and_is_told(train, made, capsys):
    model = made(train=train)
    training = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    kinds = {"experts": {"lora_A", "lora_B"}, "routers": {"weight"}}
    assert training == kinds.get(train, {"lora_A", "lora_B", "weight"})
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,d} ||" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"router": "per_block", "rslora": True, "routing": "top_p"}])
def test_what_peft_saves_comes_back_by_every_door(options, made, base, ids, tmp_path):
    model = made(**options)
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path), ids), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), want)
    trained_on = PeftModel.from_pretrained(bare(base), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(logits(trained_on, ids), want)
    assert sum(p.requires_grad for p in trained_on.parameters()) == len(load_file(tmp_path / MODEL))
    ours, _ = load_mixture(tmp_path)
    assert torch.equal(logits(ours, ids), want)
    assert mixture_of(ours).config == mixture_of(model).config
    assert find_mixture(tmp_path) == tmp_path


MODEL = "adapter_model.safetensors"


def test_a_mixture_folder_opens_in_peft_and_nothing_is_in_it_twice(made, base, ids, tmp_path):
    model = made()
    want = logits(model, ids)
    save_mixture(mixture_of(model), tmp_path / "m", base=str(base))
    assert load_file(tmp_path / "m" / MODEL) == {} and (tmp_path / "m" / MODEL).stat().st_size < 200
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(opened, ids), want)
    assert torch.equal(logits(load_mixture(tmp_path / "m")[0], ids), want)
    assert torch.equal(
        logits(PeftModel.from_pretrained(bare(base), tmp_path / "m", low_cpu_mem_usage=True), ids), want
    )
    answer = opened.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        answer, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    )
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_mixture(tmp_path / "again")[0], ids), want)


def test_a_mixture_folder_without_its_weights_is_refused_not_opened_untrained(made, base, tmp_path):
    save_mixture(mixture_of(made()), tmp_path / "m", base=str(base))
    with pytest.raises(UserError, match="came without its folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    config = PeftConfig.from_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="came without its folder"):
        PeftModel.from_pretrained(bare(base), tmp_path / "m", config=config)


def lose(tensors):
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.bank.lora_B"]


def narrow(tensors):
    tensors["base_model.model.model.layers.1.self_attn.v_proj.router.weight"] = torch.zeros(3, 31)


def strange(tensors):
    tensors["base_model.model.model.layers.1.self_attn.v_proj.telepathy"] = torch.zeros(2)


def poison(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bank.lora_B"][1, 0, 0] = float("nan")


@pytest.mark.parametrize("harm", [lose, narrow, strange, poison])
def test_weights_that_are_not_the_mixtures_are_refused_by_both(harm, made, base, tmp_path):
    made().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / MODEL)
    harm(tensors)
    save_file(tensors, tmp_path / MODEL)
    with pytest.raises(UserError):
        PeftModel.from_pretrained(bare(base), tmp_path)
    with pytest.raises(UserError):
        load_mixture(tmp_path)


def test_a_file_that_is_cut_or_gone_is_refused_by_both(made, base, tmp_path):
    made().save_pretrained(tmp_path)
    whole = (tmp_path / MODEL).read_bytes()
    (tmp_path / MODEL).write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(UserError, match="safetensors"):
            PeftModel.from_pretrained(bare(base), tmp_path)
        with pytest.raises(UserError, match="safetensors"):
            load_mixture(tmp_path)
        (tmp_path / MODEL).unlink(missing_ok=True)


def test_a_mixture_folder_is_not_loaded_over_a_mixture(made, base, tmp_path):
    model = made()
    save_mixture(mixture_of(model), tmp_path / "m", base=str(base))
    with pytest.raises(UserError, match="over a mixture"):
        model.load_adapter(tmp_path / "m", "default")


@pytest.mark.parametrize("name", ["law/civil", "../law", ""])
def test_an_experts_name_is_a_folders_name_from_the_start(name, made, tmp_path):
    with pytest.raises(UserError, match="can't be the name of an expert"):
        MixerConfig(targets=["q"], experts=[name, "b"])
    made().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"law"', json.dumps(name)))
    with pytest.raises(UserError, match="can't be the name of an expert"):
        load_mixture(tmp_path)


def test_the_form_of_the_base_is_kept_and_another_one_is_told(made, base, tmp_path):
    made().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    values = json.loads(path.read_text())
    assert (values["model_type"], values["dtype"], values["quantization"]) == ("llama", "float32", "none")
    save_mixture(mixture_of(made()), tmp_path / "m", base=str(base))
    of_folder = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert of_folder["quantization"] == "none" and of_folder["dtype"] == "float32"
    path.write_text(json.dumps({**values, "quantization": "nf4", "dtype": "bfloat16"}))
    with pytest.warns(UserWarning, match="quantization is none, and the mixture was made on nf4"):
        opened = PeftModel.from_pretrained(bare(base), tmp_path / "saved")
    opened.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (kept["quantization"], kept["dtype"]) == ("nf4", "bfloat16")


def test_what_peft_saves_has_our_card_and_a_loaded_folders_own(made, base, tmp_path):
    model = made()
    model.save_pretrained(tmp_path / "fresh")
    card = (tmp_path / "fresh" / "README.md").read_text()
    assert "| law | 4 | 8 |" in card and "More Information Needed" not in card and "experts/law" not in card
    facts = {"limits": ["Never asked about whales."], "pictures": {"routing.png": b"a picture"}}
    save_mixture(mixture_of(model), tmp_path / "m", base=str(base), facts=facts)
    PeftModel.from_pretrained(bare(base), tmp_path / "m").save_pretrained(tmp_path / "kept")
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "whales" in card and "experts/law" not in card and card.count("## Use") == 1
    assert (tmp_path / "kept" / "routing.png").read_bytes() == b"a picture"
    # what may have been trained on is another mixture than the card was written for
    trained = PeftModel.from_pretrained(bare(base), tmp_path / "m", is_trainable=True)
    trained.save_pretrained(tmp_path / "trained")
    assert "whales" not in (tmp_path / "trained" / "README.md").read_text()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path / "own")
    assert "# Mine" in (tmp_path / "own" / "README.md").read_text()


def test_what_a_mixture_can_not_be_is_refused_with_the_way_out(made, base, tmp_path):
    model = made()
    for act, fix in (
        (lambda: model.add_adapter("second", MixerConfig(targets=["q"], experts=["a"])), "route_to"),
        (lambda: model.delete_adapter("default"), "route_to"),
        (lambda: model.set_adapter("second"), "second"),
        (model.merge_and_unload, "export"),
    ):
        with pytest.raises(ValueError, match=fix):
            act()
    with pytest.raises(UserError, match=r"dsmixer\.peft\.MixerConfig"):
        get_peft_model(bare(base), dsmixer.MixerConfig(targets=["q"], experts=["a"]))
    with pytest.raises(UserError, match="the router gets no gradient"):
        MixerConfig(targets=["q"], experts=["a", "b"], top_k=1)
    for bad in ({"train": "all"}, {"rsl": {"beta": 1.0}}, {"routing": "hard"}):
        with pytest.raises(UserError, match="choose from"):
            MixerConfig(targets=["q"], experts=["a", "b"], **bad)


def test_unloaded_it_is_the_base_again(made, base, ids):
    model = made()
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, ids), logits(bare(base), ids))
    assert unloaded.state_dict().keys() == bare(base).state_dict().keys()
    assert not hasattr(unloaded.config, "router_aux_loss_coef")


def test_what_is_uploaded_names_base_and_method(made, base, tmp_path):
    made().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "DSMIXER" and values["base_model_name_or_path"] == str(base)
    assert values["experts"] == ["law", "chess", "go"] and values["weights_in"] == "adapter_model"
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_an_encoder_decoder_model_goes_the_same_ways(ids, tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    bare = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    config = MixerConfig(targets=["q", "v"], experts=["a", "b"], rank=4, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(bare, config).eval()
    stir(mixture_of(model))
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    with torch.no_grad():
        want = model(**given).logits
        model.save_pretrained(tmp_path / "saved")
        save_mixture(mixture_of(model), tmp_path / "mixture", base=str(tmp_path / "base"))
        for folder in (tmp_path / "saved", tmp_path / "mixture"):
            opened = AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
            assert torch.equal(opened(**given).logits, want)
            assert torch.equal(load_mixture(folder)[0](**given).logits, want)
        answer = opened.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(answer, model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))


def test_experts_inside_a_state_space_mixer_act_and_are_switched_off(ids):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2)
    bare = AutoModelForCausalLM.from_config(config).eval()
    want = logits(bare, ids)
    targets = ["x_proj", "dt_proj", "out_proj"]
    model = get_peft_model(bare, MixerConfig(targets=targets, experts=["a", "b"], rank=2))
    stir(mixture_of(model))
    assert not torch.allclose(logits(model, ids), want, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.unload(), ids), want, rtol=1e-5, atol=1e-5)


def test_a_base_in_four_bits_comes_back_in_four_bits(ids, tmp_path):
    torch.manual_seed(0)
    wide = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    AutoModelForCausalLM.from_config(wide, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    options = {"quantization_config": packing, "dtype": torch.bfloat16}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    model = get_peft_model(packed, MixerConfig(**SETTINGS))
    stir(mixture_of(model))
    want = logits(model, ids)
    model.save_pretrained(tmp_path / "saved")
    save_mixture(mixture_of(model), tmp_path / "m", base=str(tmp_path / "base"))
    for folder in (tmp_path / "saved", tmp_path / "m"):
        ours, _ = load_mixture(folder)
        assert type(next(iter(mixture_of(ours).mixers.values())).base).__name__.endswith("Linear4bit")
        torch.testing.assert_close(logits(ours, ids), want, rtol=0.02, atol=0.02)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*quantization")
            theirs = AutoPeftModelForCausalLM.from_pretrained(folder, **options)
        assert torch.equal(logits(theirs, ids), want)
        with pytest.warns(UserWarning, match="quantization is none, and the mixture was made on nf4"):
            AutoPeftModelForCausalLM.from_pretrained(folder)
