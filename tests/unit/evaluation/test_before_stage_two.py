"""Experts before and after stage two (arXiv 2507.00029, A.14): against PEFT and a run of stage one alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from support import before_ranks
from support.forked import RankServer
from support.launching import TIMEOUT_SECONDS, launch
from support.oracles import summed_loss
from support.tiny import byte_tokenizer, write_recipe
from transformers import AutoModelForCausalLM

from dsmixer.cli.main import main
from dsmixer.config.recipe import load_recipe
from dsmixer.data.domains import load_domains
from dsmixer.evaluation.sheet import make_sheet

pytestmark = pytest.mark.timeout(3 * TIMEOUT_SECONDS)

NAMES = ("sums", "words", "rare")
SCORED = "evaluation.methods=[base,experts,experts@stage1]"
LAYOUTS = {
    "tokens": ["placement.mode=tokens", "placement.expert_parallel_size=2", "deepspeed.zero_stage=2"],
    "weights": ["placement.mode=weights", "deepspeed.zero_stage=3"],
}


class Runs:
    """Runs of one recipe, which keeps as many examples from stage one whether or not it has a stage two."""

    def __init__(self, folder: Path, server: RankServer) -> None:
        self.folder, self.server = folder, server
        self.recipe = write_recipe(folder)
        values = yaml.safe_load(self.recipe.read_text())
        for domain in values["data"]["domains"]:
            domain["test"] = domain["train"]
        values["stage2"]["data"] |= {"held_out": 16}
        values["evaluation"] = {"max_examples": 3, "exact_match": False, "batch_size": 4}
        self.recipe.write_text(yaml.safe_dump(values))
        self.outputs: dict[str, str] = {}

    def run(self, name: str, *more: str, ranks: int = 2) -> Path:
        job = self.server.run(["--config", str(self.recipe), f"run.name={name}", *more], ranks=ranks)
        assert set(job.codes.values()) == {0}, job.output[-4000:]
        self.outputs[name] = job.output
        return self.folder / "runs" / name

    def scored(self, layout: str) -> Path:
        """The whole run in a layout, which scores its experts before and after; made once."""
        if layout in self.outputs:
            return self.folder / "runs" / layout
        return self.run(layout, *LAYOUTS[layout], SCORED)


def losses(rows: list[dict]) -> dict[tuple[str, str], float]:
    return {(row["method"], row["domain"]): row["value"] for row in rows if row["metric"] == "loss"}


def evaluated(run: Path) -> dict[tuple[str, str], float]:
    return losses(json.loads((run / "evaluation.json").read_text())["rows"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("before")
    with RankServer(folder) as server:
        yield Runs(folder, server)


@pytest.fixture(scope="module")
def in_peft(runs: Runs) -> dict[tuple[str, str], float]:
    """Losses of the adapters that a run of stage one alone has published, by PEFT and transformers."""
    run = runs.run("first", "stage2.enabled=false", "evaluation.enabled=false", ranks=1)
    recipe = load_recipe(run / "config.yaml").recipe
    domains = load_domains(recipe.data, seed=recipe.run.seed, quarantine=None)
    sheet = make_sheet(domains, byte_tokenizer(), max_length=64, max_examples=3, seed=recipe.run.seed)
    found = {}
    for name in NAMES:
        base = AutoModelForCausalLM.from_pretrained(recipe.base.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(run / "mixture" / "experts" / name)).eval()
        for g, domain in enumerate(sheet.domains):
            total = targets = 0.0
            for row in sheet.rows([g]):
                ids = torch.from_numpy(sheet.store.input_ids(row).astype("int64"))[None]
                first = int(sheet.store.target_starts[row])
                with torch.no_grad():
                    total += float(summed_loss(model(ids).logits, ids, first))
                targets += ids.shape[1] - first
            found[name, domain] = total / targets
    return found


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_run_scores_its_experts_as_stage_one_left_them_wherever_they_lie(
    layout: str, runs: Runs, in_peft: dict[tuple[str, str], float], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the run itself, on two ranks, and read from its checkpoints afterwards in one process."""
    run = runs.scored(layout)
    own = evaluated(run)
    for (name, domain), loss in in_peft.items():
        assert own[f"expert:{name}@stage1", domain] == pytest.approx(loss, rel=1e-4)
        assert abs(own[f"expert:{name}", domain] / loss - 1) > 1e-3, "stage two has moved it"
    assert main(["evaluate", str(run), "--methods", "experts,experts@stage1", "--json"]) == 0
    read = losses(json.loads(capsys.readouterr().out)["rows"])
    assert read == pytest.approx({key: loss for key, loss in own.items() if key[0] != "base"}, rel=1e-5)


def test_where_stage_one_is_gone_stage_two_still_knows_what_it_began_with(
    runs: Runs, in_peft: dict[tuple[str, str], float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.folder / "runs" / "gone"
    shutil.copytree(runs.scored("tokens"), run)
    shutil.rmtree(run / "checkpoints" / "stage1")
    assert main(["evaluate", str(run), "--methods", "expert:words@stage1,expert:words", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    read = losses(result["rows"])
    for domain in NAMES:
        loss = in_peft["words", domain]
        assert read["expert:words@stage1", domain] == pytest.approx(loss, rel=1e-4)
        assert abs(read["expert:words", domain] / loss - 1) > 1e-3
    assert result["costs"]["expert:words@stage1"]["found"]["checkpoint"].endswith("stage2/step-00000006")


def test_frozen_experts_are_not_scored_twice_and_this_is_said(runs: Runs) -> None:
    run = runs.run("frozen", "stage2.experts=frozen", SCORED, ranks=1)
    assert {method for method, _ in evaluated(run)} == {"base", *(f"expert:{name}" for name in NAMES)}
    assert "experts@stage1 is not scored: stage two has not trained the experts" in runs.outputs["frozen"]


def test_a_damaged_checkpoint_is_named(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.folder / "runs" / "frozen"
    (file,) = (run / "checkpoints" / "stage1" / "step-00000006").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["evaluate", str(run), "--methods", "expert:sums@stage1"]) == 2
    assert f"{file}: not what was saved" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("DSMIXER_LONG") != "1", reason="four runs more: DSMIXER_LONG=1")
def test_on_the_live_engine_the_experts_come_and_go_bit_for_bit(tmp_path: Path) -> None:
    spread = ["placement.mode=tokens", "placement.expert_parallel_size=2", "deepspeed.zero_stage=3"]
    layouts = {**LAYOUTS, "spread_zero3": spread, "replicate": ["deepspeed.zero_stage=1"]}
    recipe = write_recipe(tmp_path)
    launch(Path(before_ranks.__file__), [str(recipe), json.dumps(layouts)], ranks=2).check()
    for name in layouts:
        facts = json.loads((tmp_path / "runs" / name / "before.json").read_text())
        assert all(facts.values()), (name, facts)
