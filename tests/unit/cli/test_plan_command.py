"""``dsmixer plan`` from the command line: tables, JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig
from unit.placement.llama3 import llama3_shape

from dsmixer.cli.main import main
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.placement.choice import Candidate
from dsmixer.placement.owners import owners_of, pack_slots
from dsmixer.placement.plan import make_plan
from dsmixer.placement.request import Cluster
from dsmixer.training.planning import PoolFacts, plan_request


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three domains whose data is not there, on a hub model that is out of reach."""
    values = {
        "base": {"model": "somebody/some-llama"},
        "data": {"domains": [{"name": name, "train": f"{name}.jsonl"} for name in ("law", "chess", "code")]},
        "mixer": {"rank": 8, "dropout": 0.0},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    values: dict[str, object] = json.loads(capsys.readouterr().out)
    return values


def test_json_holds_the_choice_and_every_layout(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(
        capsys, "--config", recipe, "--model-config", config, "--world-size", 4, "--device-memory", "24GB"
    )
    assert plan["fits"] is True and plan["device_memory"] == 24 * 2**30
    layouts: list[dict[str, object]] = plan["layouts"]  # type: ignore[assignment]
    assert {layout["mode"] for layout in layouts} == {"replicate", "weights", "tokens"}
    assert [layout["sent_bytes"] for layout in layouts] == sorted(layout["sent_bytes"] for layout in layouts)  # type: ignore[type-var]
    assert plan["mode"] == layouts[0]["mode"]


def test_auto_takes_tokens_where_they_are_less_than_the_gradients(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 experts of rank 64 on short rows."""
    monkeypatch.setenv("COLUMNS", "160")
    rows = ("mixer.rank=64", "data.max_length=64")
    common = ["--config", str(recipe), *rows, "--model-config", str(config), "--world-size", "8"]
    pool = ("--experts", "512")
    plan = planned(capsys, *common, *pool)
    assert plan["mode"] == "tokens" and plan["expert_parallel_size"] > 1  # type: ignore[operator]
    sent: dict[str, dict[str, int]] = plan["bytes_sent_per_step"]  # type: ignore[assignment]
    assert sent["stage1"]["tokens"] == sent["stage1"]["pairs"] == 0 < sent["stage2"]["pairs"]
    assert main(["plan", *common, *pool]) == 0
    shown = capsys.readouterr().out
    assert "tokens (chosen)" in shown and "stage one sends no tokens" in shown
    assert "by name" not in shown and "not yet" not in shown
    named = planned(capsys, *common[:2], "placement.mode=tokens", *common[2:], *pool)
    assert named["notes"] == plan["notes"] and named["owners"] == plan["owners"]


def test_a_run_plans_with_the_slots_of_its_data(recipe: Path) -> None:
    """Other slots are other owners; without them the plan packs the training tokens."""
    loaded = load_recipe(recipe, ["placement.mode=tokens", "placement.expert_parallel_size=2"])
    facts = PoolFacts(["law", "chess", "code"])
    cluster = Cluster(2, device_memory=80 * 2**30)
    slots = pack_slots([6.0, 1.0, 1.0], 4)
    run = make_plan(plan_request(loaded, llama3_shape(), facts, cluster, slots=slots))
    free = make_plan(plan_request(loaded, llama3_shape(), facts, cluster))
    assert run.chosen.owners == owners_of(slots, 2)
    assert free.chosen.owners == owners_of(pack_slots([1.0, 1.0, 1.0], 2), 2)


def test_a_loss_on_experts_outputs_leaves_the_plan_one_mode_and_more_work(recipe: Path) -> None:
    """Where ``tokens`` would be cheaper, and a second gradient of a bank is taken."""
    pool = PoolFacts([f"e{i}" for i in range(512)])
    small = ["mixer.rank=64", "data.max_length=64", "stage1.enabled=false"]

    def chosen(loss: str, *more: str) -> Candidate:
        loaded = load_recipe(recipe, [*small, f"stage2.routing_loss={loss}", *more])
        return make_plan(plan_request(loaded, llama3_shape(), pool, Cluster(8))).chosen

    assert chosen("switch").layout.mode == "tokens" and chosen("aesl").layout.mode == "replicate"
    plain, aesl = (chosen(loss, "placement.mode=replicate").memory for loss in ("switch", "aesl"))
    more = aesl["stage2"].buffers - plain["stage2"].buffers
    assert more > 0 and aesl["stage2"].activations == plain["stage2"].activations
    with pytest.raises(UserError, match=r"(?s)AESL's orthogonality.*on several ranks.*mode: replicate"):
        chosen("aesl", "placement.mode=tokens")


def test_the_file_config_json_and_its_folder_are_the_same(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = planned(capsys, "--config", recipe, "--model-config", config, "--world-size", 2)
    two = planned(capsys, "--config", recipe, "--model-config", config / "config.json", "--world-size", 2)
    assert one == two


def test_a_larger_pool_and_its_tokens_can_be_asked_for(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--config", recipe, "placement.mode=tokens", "--model-config", config, "--world-size", 2)
    assert planned(capsys, *common, "--experts", 40)["num_experts"] == 40
    plan = planned(capsys, *common, "--tokens", "law=6e9", "--tokens", "chess=1e9", "--tokens", "code=1e9")
    law, chess, code = (plan["owners"][name] for name in ("law", "chess", "code"))  # type: ignore[index]
    assert len(law) == 2 and len(chess) == len(code) == 1, "three quarters of the tokens have two owners"
    assert chess == code and max(law.values()) == pytest.approx(2 / 3, abs=1e-3)


def test_the_table_names_the_choice_the_bytes_and_the_reason(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    command = ["--config", recipe, "--model-config", config, "--world-size", 4, "--device-memory", "24GB"]
    assert main(["plan", *map(str, command)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "3 experts of rank 8 on 4 ranks",
        "fits",
        "optimizer",
        "pairs",
        "tokens",
        "why:",
        "3·R·E·Σ(D+O)",
    ):
        assert text in shown, text


def test_a_note_says_where_a_four_bit_base_is_whole(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    keys = ["base.quantization=nf4", "deepspeed.zero_stage=3"]
    arguments = [*keys, "--model-config", str(config), "--world-size", "2"]
    assert main(["plan", "--config", str(recipe), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "whole on every rank while it is loaded" in " ".join(shown.split())


def test_where_nothing_fits_it_still_ends_well_and_says_what_would(
    recipe: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--config", recipe, "--model-config", config, "--world-size", 1)
    plan = planned(capsys, *common, "--device-memory", "3MB")
    assert plan["fits"] is False and plan["remedies"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model-config", "nowhere"], ("nowhere", "no such file")),
        ([], ("base.model: somebody/some-llama", "Fix")),
        (["--tokens", "poetry=3"], ("poetry", "law")),
        (["--tokens", "law=many"], ("many", "NAME=3e9")),
        (["--tokens", "law=3"], ("chess, code",)),
        (["placement.expert_parallel_size=3"], ("expert_parallel_size", "divisor of 4")),
        (["placement.mode=weights", "deepspeed.zero_stage=2"], ("weights", "ZeRO 2")),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    recipe: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = [text for text in arguments if text[0] != "-" and "." in text]
    flags = [text for text in arguments if text not in overrides]
    model = [] if "--model-config" in flags or not arguments else ["--model-config", str(config)]
    command = ["plan", "--config", str(recipe), *overrides, "--world-size", "4", *model, *flags]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


@pytest.mark.parametrize("size", ["80 elephants", "0GB", "-3GB"])
def test_a_size_that_is_none_is_refused(recipe: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--config", str(recipe), "--world-size", "1", f"--device-memory={size}"])
    assert stopped.value.code == 2 and "80GB" in capsys.readouterr().err
