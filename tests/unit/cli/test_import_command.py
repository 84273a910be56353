"""``dsmixer import``: a mixture folder of ready-made adapters, made without the base's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.found_adapters import train_by_chance
from support.tiny import write_base
from transformers import AutoModelForCausalLM

from dsmixer.adapters.importing import import_adapters
from dsmixer.adapters.loading import load_mixture
from dsmixer.cli.main import main
from dsmixer.model.inject import mixture_of, route_to

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two adapters that PEFT trained on it."""
    root = tmp_path_factory.mktemp("import")
    write_base(root / "base")
    for name, options in {
        "law": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "chess": {"r": 6, "use_rslora": True, "target_modules": ["v_proj", "up_proj"]},
    }.items():
        config = peft.LoraConfig(lora_alpha=9, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
        adapted = train_by_chance(peft.get_peft_model(load(root / "base"), config))
        adapted.save_pretrained(root / name)
    return root


def command(made: Path, out: Path, *more: str) -> list[str]:
    adapters = [f"{name}={made / name}" for name in ("law", "chess")]
    return ["import", *adapters, "--base-model", str(made / "base"), "--out", str(out), *more]


def test_the_folder_loads_and_each_expert_computes_what_peft_computes(made: Path, tmp_path: Path) -> None:
    assert main(command(made, tmp_path / "mixture")) == 0
    # without the weights of the base there would be nothing to load them from
    model, tokenizer = load_mixture(tmp_path / "mixture", dtype="float32")
    assert tokenizer is not None and (tmp_path / "mixture" / "tokenizer.json").is_file()
    for name in ("law", "chess"):
        alone = peft.PeftModel.from_pretrained(load(made / "base"), made / name).eval()
        with torch.no_grad(), route_to(model, name):
            torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (model(IDS).logits - load(made / "base")(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["per_projection", "per_block"])
def test_the_routers_are_those_of_import_adapters_with_the_base_loaded(
    router: str, made: Path, tmp_path: Path
) -> None:
    options = ["--router", router, "--top-k", "1", "--routing", "topk", "--seed", "5"]
    assert main(command(made, tmp_path / "mixture", "--targets", "q", "v", "up_proj", "o", *options)) == 0
    live = import_adapters(
        load(made / "base"),
        {name: made / name for name in ("law", "chess")},
        targets=["q", "v", "up_proj", "o"],
        router=router,
        top_k=1,
        seed=5,
    )
    saved = load_file(tmp_path / "mixture" / "routers.safetensors")
    wanted = {f"{path}.weight": own.weight.detach() for path, own in live.routers.items()}
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in saved)
    assert mixture_of(load_mixture(tmp_path / "mixture")[0]).config == live.config


def test_no_weight_of_the_base_is_read(made: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((made / "base" / "config.json").read_bytes())
    arguments = [
        "import",
        f"law={made / 'law'}",
        "--base-model",
        str(bare),
        "--out",
        str(tmp_path / "mixture"),
    ]
    assert main(arguments) == 0
    assert not (tmp_path / "mixture" / "tokenizer.json").exists()


def test_it_says_of_each_expert_what_it_is_and_what_comes_next(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command(made, tmp_path / "mixture")) == 0
    out = capsys.readouterr().out
    assert "2 experts on 6 projections, 6 routers that are not trained yet" in out
    assert "law    rank 4, scale 2.25, 4 of 6 projections" in out
    assert "chess  rank 6, scale 3.67423, 4 of 6 projections" in out
    assert (
        f"dsmixer generate {tmp_path / 'mixture'} --expert law" in out
        and f"mixer.mixture: {tmp_path / 'mixture'}" in out
    )


def test_json_holds_the_same(made: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(command(made, tmp_path / "mixture", "--json")) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["folder"] == str(tmp_path / "mixture") and about["base"] == str(made / "base")
    assert about["targets"] == ["q_proj", "up_proj", "v_proj"] and about["notes"] == []
    law, chess = about["experts"]
    assert law == {
        "name": "law",
        "source": str(made / "law"),
        "ranks": [4],
        "scales": [2.25],
        "projections": 4,
    }
    assert chess["ranks"] == [6] and chess["scales"] == [pytest.approx(9 / 6**0.5)]


def test_a_mixture_is_replaced_if_asked_for_and_nothing_else_is(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command(made, tmp_path / "mixture")) == 0
    routers = tmp_path / "mixture" / "routers.safetensors"
    before = routers.read_bytes()
    # refused before the adapters are looked at
    again = command(made, tmp_path / "mixture", "--seed", "7")
    assert main(["import", "nobody=nowhere", *again[1:]]) == 2
    told = capsys.readouterr().err
    assert "a mixture is there already" in told and "--replace" in told and "nowhere" not in told
    assert routers.read_bytes() == before
    assert main([*again, "--replace"]) == 0
    assert routers.read_bytes() != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "one.txt").write_text("years of work")
    for more in ([], ["--replace"]):
        assert main(command(made, tmp_path / "thesis", *more)) == 2
        assert "something else is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["one.txt"]


def test_another_base_and_parts_left_out_are_told_in_the_text_and_in_json(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    law = tmp_path / "law"
    shutil.copytree(made / "law", law)
    config = json.loads((law / "adapter_config.json").read_text())
    (law / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "someone/another-7b"})
    )
    (law / "non_lora_trainables.bin").write_bytes(b"never opened")
    arguments = ["import", f"law={law}", "--base-model", str(made / "base"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "note: the adapter law says that it was trained on someone/another-7b" in out
    assert "note: the adapter law has weights that were trained besides the adapter" in out
    assert main([*arguments, "--replace", "--json"]) == 0
    base, left = json.loads(capsys.readouterr().out)["notes"]
    assert "someone/another-7b" in base and "non_lora_trainables.bin" in left


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["law"], "names no expert and its adapter"),
        (["=x"], "names no expert and its adapter"),
        (["law={made}/law", "law={made}/chess"], "two experts are called 'law'"),
        (["../law={made}/law"], "can't be the name of an expert"),
        (["law={made}/nowhere"], "no such folder"),
        (["law={made}/law", "--targets", "q"], "has no mixer on"),
        (["law={made}/law", "--top-k", "4"], "top_k 4 with 1 experts"),
        (["law={made}/law", "--base-model", "{made}/law"], "no model configuration could be read"),
    ],
)
def test_wrong_input_is_one_message_and_nothing_is_made(
    arguments: list[str], reason: str, made: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [argument.format(made=made) for argument in arguments]
    base = [] if "--base-model" in given else ["--base-model", str(made / "base")]
    assert main(["import", *given, *base, "--out", str(tmp_path / "mixture")]) == 2
    told = capsys.readouterr()
    assert reason in told.err and told.err.count("error:") == 1 and not told.out
    assert not (tmp_path / "mixture").exists()
