"""The mixture folder: what is loaded answers as what was saved, and nothing else is overwritten."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import dsmixer
from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.config.errors import UserError
from dsmixer.model.inject import attach_mixers, mixture_of, route_to


def greedy(model, token_ids):
    return model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        do_sample=False,
        max_new_tokens=12,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"router": "per_block", "rslora": True, "top_k": 1, "renormalize": False}),
        ("llama", {"routing": "top_p", "top_p": 0.6, "targets": ["q", "v"]}),
        ("gpt2", {"routing": "soft"}),
        ("phi3", {"experts": ["a", "b", "c", "d"], "ranks": {"b": 9}, "alphas": {}, "rank": 3}),
    ],
)
def test_a_loaded_mixture_generates_the_same_tokens(
    kind, options, make_mixture, base_folder, token_ids, tmp_path
):
    mixture = make_mixture(kind, **options)
    save_mixture(mixture, tmp_path / "mixture", base=str(base_folder(kind)))
    loaded, tokenizer = load_mixture(tmp_path / "mixture")
    assert tokenizer is None and not loaded.training
    assert mixture_of(loaded).config == mixture.config
    want, got = mixture.model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    assert torch.equal(greedy(loaded, token_ids), greedy(mixture.model, token_ids))
    for name in (*mixture.expert_names, None):
        with route_to(loaded, name), route_to(mixture.model, name):
            assert torch.equal(greedy(loaded, token_ids), greedy(mixture.model, token_ids))


def test_generation_with_the_cache_equals_generation_without(make_mixture, base_folder, token_ids, tmp_path):
    save_mixture(make_mixture("llama"), tmp_path / "mixture", base=str(base_folder("llama")))
    model, _ = load_mixture(tmp_path / "mixture")
    tokens = token_ids
    with torch.no_grad():
        for _ in range(12):
            best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], dim=1)
    assert torch.equal(greedy(model, token_ids), tokens)


def test_the_folder_holds_what_the_contract_names(make_mixture, tokenizer, tmp_path):
    facts = {
        "domains": [{"name": "law", "expert": "law", "train": 90, "test": 10}],
        "evaluation": {
            "rows": [
                {"domain": "law", "method": "base", "metric": "loss", "value": 2.5, "num_examples": 10},
                {"domain": "law", "method": "mixture", "metric": "loss", "value": 1.25, "num_examples": 10},
            ]
        },
    }
    save_mixture(make_mixture("llama"), tmp_path / "m", tokenizer=tokenizer, base="org/tiny", facts=facts)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"mixer_config.json", "routers.safetensors", "experts", "README.md", "tokenizer.json"} <= names
    assert {path.name for path in (tmp_path / "m" / "experts").iterdir()} == {"law", "chess"}
    assert not [path for path in (tmp_path / "m").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    routers = load_file(tmp_path / "m" / "routers.safetensors")
    assert routers["model.layers.0.self_attn.q_proj.weight"].shape == (2, 32) and len(routers) == 8
    card = (tmp_path / "m" / "README.md").read_text()
    assert "license: other" in card and "base_model: org/tiny" in card
    assert "| law | 2.5000 | 1.2500 |" in card and "| law | law | 90 | 10 |" in card


def test_the_tokenizer_comes_back(make_mixture, base_folder, tokenizer, tmp_path):
    save_mixture(make_mixture("llama"), tmp_path / "m", tokenizer=tokenizer, base=str(base_folder("llama")))
    _, loaded = load_mixture(tmp_path / "m")
    assert loaded("Größe 7")["input_ids"] == tokenizer("Größe 7")["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_full_tensors_replace_partitioned_parameters(make_mixture, base_folder, tmp_path):
    mixture = make_mixture("llama")
    parameters = [*mixture.expert_parameters(), *mixture.router_parameters()]
    state = {name: parameter.detach().clone() for name, parameter in parameters}
    for _, parameter in parameters:
        parameter.data = torch.empty(0)
    with pytest.raises(UserError, match="the weight is empty"):
        save_mixture(mixture, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    save_mixture(mixture, tmp_path / "m", base=str(base_folder("llama")), state=state)
    loaded = load_mixture(tmp_path / "m")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_base_path_relative_to_the_folder_is_found(make_mixture, base_folder, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(base_folder("llama"))
    save_mixture(make_mixture("llama"), tmp_path / "m", base="../base")
    monkeypatch.chdir(tmp_path / "m" / "experts" / "law")
    model, _ = load_mixture(tmp_path / "m")
    assert mixture_of(model).expert_names == ("law", "chess")


def test_the_base_is_loaded_in_the_dtype_it_had(make_mixture, base_folder, load_base, tmp_path):
    mixture = make_mixture("llama")
    model = load_base("llama").to(torch.bfloat16)
    save_mixture(attach_mixers(model, mixture.config), tmp_path / "m", base=str(base_folder("llama")))
    loaded, _ = load_mixture(tmp_path / "m")
    mixer = mixture_of(loaded).mixers["model.layers.0.self_attn.q_proj"]
    assert mixer.base.weight.dtype == torch.bfloat16 and mixer.bank.lora_A.dtype == torch.float32
    loaded, _ = load_mixture(tmp_path / "m", dtype="float32")
    assert loaded.model.embed_tokens.weight.dtype == torch.float32


def test_weights_that_are_not_finite_are_not_saved_and_the_old_mixture_stays(make_mixture, tmp_path):
    mixture = make_mixture("llama")
    save_mixture(mixture, tmp_path / "m")
    before = snapshot(tmp_path)
    with torch.no_grad():
        next(iter(mixture.routers.values())).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        save_mixture(mixture, tmp_path / "m")
    assert snapshot(tmp_path) == before


def test_only_a_mixture_is_replaced(make_mixture, tmp_path):
    mixture = make_mixture("llama")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("here")
    before = snapshot(tmp_path)
    for taken in ("thesis", "file"):
        with pytest.raises(UserError, match="something else is there already"):
            save_mixture(mixture, tmp_path / taken)
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    save_mixture(mixture, tmp_path / "empty")
    save_mixture(make_mixture("llama", experts=["one"], ranks={}, alphas={}), tmp_path / "empty")
    assert [path.name for path in (tmp_path / "empty" / "experts").iterdir()] == ["one"]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILL_THE_DISK = """
import resource, signal, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from dsmixer import MixerConfig, UserError, attach_mixers, save_mixture
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
mixture = attach_mixers(model, MixerConfig(targets=["q"], experts=["law"], rank=64))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_mixture(mixture, Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


def test_a_disk_that_refuses_leaves_the_old_mixture_and_one_message(make_mixture, base_folder, tmp_path):
    save_mixture(make_mixture("llama"), tmp_path / "m", base=str(base_folder("llama")))
    before = snapshot(tmp_path)
    command = [sys.executable, "-c", FILL_THE_DISK, str(base_folder("llama")), str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'm'}: cannot be written") and "Fix: free space" in done.stdout
    assert snapshot(tmp_path) == before


def spoil(folder, what):
    config = folder / "mixer_config.json"
    values = json.loads(config.read_text())
    if what == "later format":
        values["format_version"] = 99
    elif what == "unknown key":
        values["mixer"]["telepathy"] = 1
    elif what == "expert outside":
        values["mixer"].update(experts=["../../law", "chess"], ranks={}, alphas={})
    elif what == "other base":
        values["base"]["model_type"] = "gpt2"
    elif what == "no base":
        values["base"]["model"] = None
    elif what == "missing base":
        values["base"]["model"] = "/nowhere/at/all"
    elif what == "alpha":
        values["mixer"]["alphas"]["law"] = 1
    config.write_text("{" if what == "broken json" else json.dumps(values))
    if what == "missing expert":
        (folder / "experts" / "law").rename(folder / "experts" / "lost")
    if what == "router":
        tensors = load_file(folder / "routers.safetensors")
        tensors.pop("model.layers.0.self_attn.q_proj.weight")
        save_file(tensors, folder / "routers.safetensors")
    if what == "truncated":
        path = folder / "routers.safetensors"
        path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("later format", "format 99"),
        ("unknown key", "telepathy"),
        ("expert outside", "can't be the name of an expert"),
        ("other base", "a llama model, and the mixture was made on a gpt2"),
        ("no base", "which base model"),
        ("missing base", "the base model can't be loaded"),
        ("alpha", "alpha 1 are asked for"),
        ("broken json", "is no description of a mixture"),
        ("missing expert", "no such folder"),
        ("router", "its routers are not those"),
        ("truncated", "damaged or cut short"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(what, reason, make_mixture, base_folder, tmp_path):
    save_mixture(make_mixture("llama"), tmp_path / "m", base=str(base_folder("llama")))
    spoil(tmp_path / "m", what)
    with pytest.raises(UserError, match=reason.replace("(", r"\(")):
        load_mixture(tmp_path / "m")


def test_a_folder_that_is_no_mixture_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="give the folder of a mixture"):
            load_mixture(folder)


def test_the_public_names_load_on_first_use():
    code = (
        "import sys, dsmixer; assert 'torch' not in sys.modules; "
        "from dsmixer import *; import torch; "
        "print(all(getattr(dsmixer, name) is not None for name in dsmixer.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True" and dsmixer.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no attribute 'telepathy'"):
        dsmixer.telepathy  # noqa: B018


def test_an_exported_expert_has_no_projection_that_it_never_had(make_mixture, load_base, token_ids, tmp_path):
    mixture = make_mixture("llama")
    silent = [f"model.layers.{layer}.self_attn.{name}" for layer, name in ((0, "q_proj"), (1, "o_proj"))]
    with torch.no_grad():
        for path in silent:
            mixture.mixers[path].bank.lora_A[0].zero_()
            mixture.mixers[path].bank.lora_B[0].zero_()
    save_mixture(mixture, tmp_path / "m", base="org/tiny")
    keys = load_file(tmp_path / "m" / "experts" / "law" / "adapter_model.safetensors")
    assert len(keys) == 2 * (len(mixture.mixers) - 2) and not [
        key for key in keys if any(s in key for s in silent)
    ]
    whole = load_file(tmp_path / "m" / "experts" / "chess" / "adapter_model.safetensors")
    assert len(whole) == 2 * len(mixture.mixers)
    # PEFT finds its targets there, and no more of them
    model = PeftModel.from_pretrained(load_base("llama"), tmp_path / "m" / "experts" / "law").eval()
    assert len([name for name, _ in model.named_parameters() if "lora_" in name]) == len(keys)
    with torch.no_grad(), route_to(mixture.model, "law"):
        want = mixture.model(token_ids).logits
        torch.testing.assert_close(model(token_ids).logits, want, rtol=1e-5, atol=1e-5)


def test_pictures_lie_beside_the_card(make_mixture, tmp_path):
    facts = {"pictures": {"routing.png": b"\x89PNG"}, "license": "mit"}
    save_mixture(make_mixture("llama"), tmp_path / "m", facts=facts)
    assert (tmp_path / "m" / "routing.png").read_bytes() == b"\x89PNG"
    card = (tmp_path / "m" / "README.md").read_text()
    assert "](routing.png)" in card and "license: mit" in card
