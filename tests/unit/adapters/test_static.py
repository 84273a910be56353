"""The static merge: what PEFT computes with it is the mixture with its weights held constant."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file

import dsmixer.peft  # noqa: F401
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.adapters.static import pruned, static_matrices, write_static
from dsmixer.cli.main import main
from dsmixer.config.errors import UserError
from dsmixer.data.domains import Domain
from dsmixer.data.records import Example
from dsmixer.evaluation.sheet import make_sheet
from dsmixer.evaluation.static_weights import mean_weights, weighed
from dsmixer.model.inject import route_to
from dsmixer.routing.router import Router

FACTS = {
    "task": "law",
    "num_weighed": 3,
    "num_held_out": 2,
    "weights": {"law": 0.5, "chess": 0.25},
    "losses": {"base": 3.0, "mixture": 2.0, "static": 2.5},
    "differences": {"static": 0.125},
}
POOL = {"experts": ["law", "chess", "go"], "ranks": {"law": 4, "chess": 6, "go": 3}, "alphas": {"law": 8}}


@pytest.fixture
def weights(make_mixture):
    def draw(mixture):
        generator = torch.Generator().manual_seed(5)
        shape = len(mixture.routers), len(mixture.expert_names)
        return torch.rand(shape, generator=generator).softmax(1)

    return draw


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", {}), ("llama", {"router": "per_block", "rslora": True}), ("gpt2", {})]
)
def test_peft_computes_the_mixture_with_constant_weights(
    kind, options, make_mixture, load_base, weights, token_ids, tmp_path
):
    mixture = make_mixture(kind, **{**POOL, **options})
    weights_ME = weights(mixture)
    rank = write_static(mixture, weights_ME, tmp_path / "static", about={"model": "org/base"}, facts=FACTS)
    assert rank == 4 + 6 + 3
    plain = PeftModel.from_pretrained(load_base(kind), tmp_path / "static").eval()
    with torch.no_grad():
        with weighed(mixture.model, weights_ME):
            want = mixture.model(token_ids).logits
        torch.testing.assert_close(plain(token_ids).logits, want, rtol=1e-5, atol=1e-5)
        # and it is neither the base nor the routed mixture
        assert not torch.allclose(mixture.model(token_ids).logits, want, atol=1e-2)
        with route_to(mixture.model, None):
            assert not torch.allclose(mixture.model(token_ids).logits, want, atol=1e-2)


def test_the_matrices_are_the_sum_of_the_experts_in_float64(make_mixture, weights):
    mixture = make_mixture("llama", **POOL)
    weights_ME = weights(mixture)
    for path, (a_RD, b_OR) in static_matrices(mixture, weights_ME).items():
        mixer = mixture.mixers[path]
        want = torch.zeros(mixer.bank.out_features, mixer.bank.in_features, dtype=torch.float64)
        for e, rank in enumerate(mixer.bank.ranks):
            alpha = mixture.config.alpha_list[e]
            product = mixer.bank.lora_B[e, :rank].double().T @ mixer.bank.lora_A[e, :rank].double()
            want += float(weights_ME[mixer.router_index, e]) * alpha / rank * product
        torch.testing.assert_close((b_OR.double() @ a_RD.double()), want, rtol=1e-4, atol=1e-5)


def test_pruned_experts_leave_rank_and_the_others_weights_stay(make_mixture, load_base, tmp_path):
    mixture = make_mixture("llama", **POOL)
    weights_ME = torch.tensor([0.6, 0.1, 0.3]).expand(len(mixture.routers), -1)
    kept_ME = pruned(weights_ME, 0.2)
    assert torch.equal(kept_ME[0], torch.tensor([0.6, 0.0, 0.3]))
    assert write_static(mixture, kept_ME, tmp_path / "s", about={}, facts=FACTS) == 4 + 3
    with pytest.raises(UserError, match="no expert is left"):
        static_matrices(mixture, pruned(weights_ME, 0.9))


def test_mean_weights_are_those_of_the_tokens_that_are_real(make_mixture, tokenizer):
    mixture = make_mixture("llama", **POOL, routing="topk", top_k=2)
    texts = [("2+2=", "4"), ("the cat ", "sleeps and runs"), ("a", "b")]
    examples = [Example(prompt, completion, "d") for prompt, completion in texts]
    sheet = make_sheet([Domain("d", "law", 1.0, [], examples)], tokenizer, max_length=64, max_examples=None)
    got = mean_weights(mixture.model, sheet, sheet.rows([0]), batch_size=2, pad_token_id=0)
    seen = {}
    for module in mixture.model.modules():
        if isinstance(module, Router):
            seen[module] = []
            module.register_forward_pre_hook(lambda module, args: seen[module].append(args[0]))
    with torch.no_grad():
        for row in range(len(sheet.store)):  # one at a time: no padding
            mixture.model(torch.tensor([sheet.store.input_ids(row).tolist()]))
    for router, index in zip(mixture.routers.values(), range(len(got)), strict=True):
        p_TE = torch.softmax(torch.cat(seen[router]).double() @ router.weight.double().T, dim=1)
        want_E = torch.zeros(3, dtype=torch.float64)
        for p_E in p_TE:
            best = p_E.topk(2).indices
            want_E[best] += p_E[best] / p_E[best].sum()
        torch.testing.assert_close(got[index].double(), want_E / len(p_TE), rtol=1e-4, atol=1e-6)


@pytest.fixture
def published_mixture(make_mixture, base_folder, tokenizer, tmp_path):
    folder = tmp_path / "mixture"
    save_mixture(make_mixture("llama", **POOL), folder, tokenizer=tokenizer, base=str(base_folder("llama")))
    task = tmp_path / "task.jsonl"
    lines = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(10)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, task


def test_the_command_writes_the_adapter_and_what_it_measured(published_mixture, load_base, tmp_path, capsys):
    folder, task = published_mixture
    out = tmp_path / "static"
    command = ["export", str(folder), "--static", str(task), "--out", str(out), "--min-weight", "0.01"]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_weighed"] == 8 and told["num_held_out"] == 2 and told["rank"] == 13
    assert sum(told["weights"].values()) == pytest.approx(1.0, abs=1e-5)
    assert told["losses"].keys() == {"base", "mixture", "static", "static, pruned"}
    assert told["losses"]["static"] == told["losses"]["static, pruned"]  # nothing was light enough
    card = (out / "README.md").read_text()
    for name, loss in told["losses"].items():
        assert f"| {name} | {loss:.4f} | {loss - told['losses']['mixture']:+.4f} |" in card
    model = PeftModel.from_pretrained(load_base("llama"), out)
    assert model.peft_config["default"].r == model.peft_config["default"].lora_alpha == 13


def test_one_expert_is_copied_bit_for_bit(published_mixture, tmp_path, capsys):
    folder, _ = published_mixture
    assert main(["export", str(folder), "--expert", "chess", "--out", str(tmp_path / "one")]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (folder / "experts" / "chess" / name).read_bytes()
    assert "rank 6" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--static": "nowhere"}, "no file and no domain"),
        ({"--static": None, "--device": None, "--expert": "art"}, "no expert is called 'art'"),
        ({"--static": None, "--expert": "law"}, "leave --device out"),
        ({"--out": "mixture/experts/mean"}, "inside the mixture"),
        ({"--out": "taken"}, "something else is there already"),
        ({"FOLDER": "taken"}, "neither a mixture nor a run folder"),
        ({"--static": "single.jsonl"}, "there is one example"),
        ({"--min-weight": "0.99"}, "every expert weighs less"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(change, told, published_mixture, tmp_path, capsys):
    folder, task = published_mixture
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "single.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    given = {"FOLDER": str(folder), "--static": str(task), "--out": str(tmp_path / "new"), "--device": "cpu"}
    places = {
        key: str(tmp_path / value) if key != "--expert" else value for key, value in change.items() if value
    }
    if "--min-weight" in places:
        places["--min-weight"] = change["--min-weight"]
    given = {key: value for key, value in {**given, **change, **places}.items() if value}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    positional = given.pop("FOLDER")
    assert main(["export", positional, *(part for pair in given.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("dsmixer: error:") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("license", ["mit\nbase_model: other/one", "a: b", ""])
def test_a_license_is_one_word_of_the_front_matter(license, published_mixture, tmp_path, capsys):
    command = ["export", str(published_mixture[0]), "--expert", "law", "--out", str(tmp_path / "one")]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--license", license])
    assert "no identifier of a license" in capsys.readouterr().err and not (tmp_path / "one").exists()
    assert main([*command, "--license", "cc-by-nc-sa-4.0"]) == 0
    assert ModelCard.load(tmp_path / "one" / "README.md").data.license == "cc-by-nc-sa-4.0"


def test_a_task_may_be_called_like_markup(published_mixture, tmp_path, capsys):
    folder, task = published_mixture
    odd = task.rename(task.with_name("[red]task[b].jsonl"))
    command = ["export", str(folder), "--static", str(odd), "--out", str(tmp_path / "s"), "--device", "cpu"]
    assert main(command) == 0
    assert "[red]task[b].jsonl" in "".join(capsys.readouterr().out.split("\n"))


def test_a_domain_with_relative_paths_says_where_to_start_from(
    published_mixture, tmp_path, monkeypatch, capsys
):
    folder, _ = published_mixture
    domain = {"name": "law", "train": "data/law.jsonl"}
    recipe = {"run": {"name": "r"}, "base": {"model": "base"}, "data": {"domains": [domain]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    command = ["export", str(folder), "--static", "law", "--out", "s", "--device", "cpu"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "data/law.jsonl" in error and "begin where the run was started" in error


def test_one_expert_of_what_peft_saved_is_that_expert(published_mixture, load_base, token_ids, tmp_path):
    opened = PeftModel.from_pretrained(load_base("llama"), published_mixture[0])
    opened.save_pretrained(tmp_path / "saved")
    command = ["export", str(tmp_path / "saved"), "--expert", "go", "--out", str(tmp_path / "one")]
    assert main(command) == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    plain = PeftModel.from_pretrained(load_base("llama"), tmp_path / "one")
    want = PeftModel.from_pretrained(load_base("llama"), published_mixture[0] / "experts" / "go")
    with torch.no_grad():
        assert torch.equal(plain(token_ids).logits, want(token_ids).logits)


def test_projections_that_no_expert_has_are_left_out(make_mixture, tmp_path):
    mixture = make_mixture("llama", **POOL)
    silent = "model.layers.1.self_attn.k_proj"
    with torch.no_grad():
        mixture.mixers[silent].bank.lora_A.zero_()
        mixture.mixers[silent].bank.lora_B.zero_()
    write_static(mixture, torch.ones(len(mixture.routers), 3) / 3, tmp_path / "s", about={}, facts=FACTS)
    keys = load_file(tmp_path / "s" / "adapter_model.safetensors")
    assert len(keys) == 2 * (len(mixture.mixers) - 1) and not [key for key in keys if silent in key]
