"""``dsmixer pool``: a command for each change, read by a person or a program; mistakes are one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny import write_base
from transformers import AutoModelForCausalLM

from dsmixer.adapters.mixture_folder import read_description, save_mixture
from dsmixer.cli.main import main
from dsmixer.model.inject import attach_mixers
from dsmixer.model.mixer_config import MixerConfig


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has published two experts, and another mixture of one."""
    folder = tmp_path_factory.mktemp("mixtures")
    base = write_base(folder / "base")
    for name, experts in (("run/mixture", ["law", "chess"]), ("other", ["math"])):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        mixture = attach_mixers(model, MixerConfig(["q", "v"], experts, rank=2, alpha=4))
        for _, parameter in mixture.expert_parameters():
            torch.nn.init.normal_(parameter)
        save_mixture(mixture, folder / name, base=str(base))
    return folder


def experts_of(folder: Path) -> tuple[str, ...]:
    return tuple(read_description(folder)[1].experts)


def test_each_change_is_a_command_and_json_says_what_was_made(
    mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixtures may be given by the folder of their run."""
    run, adapter = str(mixtures / "run"), str(mixtures / "other" / "experts" / "math")
    for words, experts in (
        (["add", run, f"sums={adapter}"], ("law", "chess", "sums")),
        (["remove", run, "chess"], ("law",)),
        (["rename", run, "law=chess", "chess=law"], ("chess", "law")),
        (["merge", run, str(mixtures / "other"), "--prefix", "b-"], ("law", "chess", "b-math")),
    ):
        out = tmp_path / words[0]
        assert main(["pool", *words, "--out", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["folder"] == str(out) and tuple(told["experts"]) == experts == experts_of(out)
    assert main(["pool", "show", str(tmp_path / "add"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [expert["num_weights"] for expert in facts["experts"]] == [2 * 2 * (32 + 32 + 32 + 16)] * 3
    assert main(["pool", "show", str(tmp_path / "add")]) == 0
    assert "added sums" in capsys.readouterr().out


def test_in_place_replaces_the_mixture_of_the_run(mixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mixtures / "run" / "mixture"
    assert main(["pool", "rename", str(mixtures / "run"), "law=laws", "--in-place"]) == 0
    assert experts_of(folder) == ("laws", "chess") and "laws, chess" in capsys.readouterr().out
    assert main(["pool", "rename", str(folder), "laws=law", "--in-place"]) == 0
    assert experts_of(folder) == ("law", "chess")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["remove", "RUN", "chess", "law"], "no expert would be left"),
        (["remove", "RUN", "maths"], "no expert is called 'maths'"),
        (["add", "RUN", "law"], "'law' is not NAME=ADAPTER"),
        (["add", "RUN", "a=x", "a=y"], "'a' is given twice"),
        (["add", "RUN", "new=/no/such/folder"], "no such folder"),
        (["add", "RUN", "../new=OTHER/experts/math"], "can't be the name of an expert"),
        (["rename", "RUN", "law=chess"], "an expert is called 'chess' already"),
        (["merge", "RUN", "RUN"], "an expert is called 'law' already"),
        (["merge", "RUN", "/no/such/folder"], "no such folder"),
        (["remove", "OTHER/experts/math", "law"], "neither a mixture nor a run folder"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2_and_nothing_is_written(
    mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    names = {"RUN": str(mixtures / "run"), "OTHER": str(mixtures / "other")}
    asked = [word.replace("RUN", names["RUN"]).replace("OTHER", names["OTHER"]) for word in words]
    assert main(["pool", *asked, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("error:") == 1 and "Traceback" not in printed.err
    assert printed.out == "" and not list(tmp_path.iterdir())


def test_where_the_result_goes_has_to_be_said(mixtures: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pool", "remove", str(mixtures / "run"), "law"])
    assert left.value.code == 2
