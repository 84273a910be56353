"""``dsmixer prune``: scores, what is chosen by them, and a folder that the other commands take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.tiny import write_base, write_domains
from transformers import AutoModelForCausalLM

from dsmixer.adapters.loading import load_mixture
from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.cli.main import main
from dsmixer.model.inject import attach_mixers, mixture_of, route_to
from dsmixer.model.mixer_config import MixerConfig

LAYERS = ["model.layers.0", "model.layers.1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's mixture, another one, and held-out rows of two domains; layer 1 shouts, layer 0 whispers."""
    folder = tmp_path_factory.mktemp("site")
    base = write_base(folder / "base")
    for name, seed in (("run/mixture", 0), ("other", 1), ("routers alike", 0)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        mixture = attach_mixers(model, MixerConfig(["q", "v"], ["sums", "words"], rank=2, alpha=4, seed=seed))
        torch.manual_seed(seed if name != "routers alike" else 2)
        for path, mixer in mixture.mixers.items():
            torch.nn.init.normal_(mixer.bank.lora_B, std=0.5 if "layers.1" in path else 0.005)
        tokenizer = None if name != "run/mixture" else _tokenizer(base)
        save_mixture(mixture, folder / name, base=str(base), tokenizer=tokenizer)
    write_domains(folder / "data", {"sums": 6, "words": 5})
    return folder


def _tokenizer(base: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def prune(site: Path, capsys: pytest.CaptureFixture[str]):
    """Calls the command with the held-out rows; its exit code and what it printed."""

    def call(*words: object, data: bool = True, mixture: str = "run") -> tuple[int, str]:
        rows = [f"--data={name}={site / 'data' / name}.jsonl" for name in ("sums", "words")] if data else []
        capsys.readouterr()
        code = main(["prune", str(site / mixture), *map(str, words), *rows, "--device=cpu"])
        told = capsys.readouterr()
        return code, told.out if code == 0 else told.err

    return call


def test_the_layer_that_says_something_is_kept_and_other_commands_take_the_folder(
    prune, site, tmp_path, capsys
):
    out = tmp_path / "less"
    code, text = prune("--keep", 1, "--score", "size", "--out", out, "--json")
    told = json.loads(text)
    assert code == 0 and told["kept"] == LAYERS[1:] and told["pruned"] == LAYERS[:1]
    assert told["scores"][LAYERS[1]] > 10 * told["scores"][LAYERS[0]]
    assert told["num_examples"] == 11 and told["weights"]["full"] == 2 * told["weights"]["pruned"]
    # the loss told is that of the folder, and of base and mixture as `evaluate` has them
    rows = [f"--data={name}={site / 'data' / name}.jsonl" for name in ("sums", "words")]
    for folder, key in ((out, "pruned"), (site / "run", "full")):
        assert main(["evaluate", str(folder), *rows, "--no-exact-match", "--json", "--device=cpu"]) == 0
        scored = json.loads(capsys.readouterr().out)["rows"]
        for method, of in (("mixture", key), ("base", "base")):
            losses = [r["value"] for r in scored if r["method"] == method and r["metric"] == "loss"]
            assert sum(losses) / 2 == pytest.approx(told["losses"][of], rel=1e-6)
    assert main(["generate", str(out), "--prompt", "4+4=", "--max-new-tokens", "8", "--device=cpu"]) == 0
    assert main(["pool", "show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["num_routers"] == 2


def test_scores_are_kept_in_a_file_and_used_again_without_rows(prune, tmp_path):
    file = tmp_path / "scores.json"
    code, text = prune("--share", 0.25, "--by=mixer", "--scores", file, "--out", tmp_path / "a", "--json")
    first = json.loads(text)
    assert code == 0 and len(first["kept"]) == 1 and json.loads(file.read_text())["score"] == first["score"]
    assert max(first["scores"], key=first["scores"].get) == first["kept"][0]
    again = ("--by=mixer", "--scores", file, "--json")
    code, text = prune("--keep", 1, *again, "--out", tmp_path / "b", data=False)
    second = json.loads(text)
    assert code == 0 and second["kept"] == first["kept"] and second["losses"] is None
    mixtures = [mixture_of(load_mixture(tmp_path / name)[0]) for name in "ab"]
    assert [list(mixture.mixers) for mixture in mixtures] == [first["kept"]] * 2
    for words, reason in (
        (("--by=layer",), "holds no scores of this mixture by layer"),
        (("--by=mixer", "--score", "size"), "holds scores of score"),
    ):
        code, text = prune("--keep", 1, *words, "--scores", file, "--out", tmp_path / "c", data=False)
        assert code == 2 and reason in text
    for other in ("other", "routers alike"):
        code, text = prune("--keep", 1, *again, "--out", tmp_path / "c", data=False, mixture=other)
        assert code == 2 and "of another mixture" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "scores.json"]


def test_rows_that_are_given_beside_known_scores_are_used_for_the_loss_and_told_apart(
    prune, tmp_path, site, capsys
):
    file, words = tmp_path / "scores.json", ("--keep", 1, "--score=size", "--json", "--scores")
    code, text = prune(*words, file, "--out", tmp_path / "a")
    first = json.loads(text)
    assert code == 0 and first["losses"]["num_examples"] == 11 and first["losses"]["as_scored"] is True
    # the same command, for another folder: the same scores, rows and losses, and the loss is measured again
    code, text = prune(*words, file, "--out", tmp_path / "b")
    again = json.loads(text)
    assert code == 0 and again["losses"] == first["losses"] and again["scores"] == first["scores"]
    # other rows: their loss is that which `evaluate` has on them, and nobody says that the scores are of them
    code, text = prune(*words, file, "--max-examples", 2, "--out", tmp_path / "c")
    other = json.loads(text)
    assert code == 0 and other["scores"] == first["scores"] and other["num_examples"] == 11
    assert other["losses"]["num_examples"] == 4 and other["losses"]["as_scored"] is False
    rows = [f"--data={name}={site / 'data' / name}.jsonl" for name in ("sums", "words")]
    flags = ["--no-exact-match", "--json", "--device=cpu", "--max-examples=2"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "c"), *rows, *flags]) == 0
    scored = json.loads(capsys.readouterr().out)["rows"]
    losses = [r["value"] for r in scored if r["method"] == "mixture" and r["metric"] == "loss"]
    assert sum(losses) / 2 == pytest.approx(other["losses"]["pruned"], rel=1e-6)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "on 11 held-out examples; loss on 4 examples, which are not those of the scores" in card
    assert "held-out examples; loss on the rows of the scores" in (tmp_path / "b" / "README.md").read_text()
    # scores of an earlier version do not say on which rows they were made
    told = json.loads(file.read_text())
    del told["rows"]
    file.write_text(json.dumps(told))
    code, text = prune(*words, file, "--out", tmp_path / "d")
    assert code == 0 and json.loads(text)["losses"]["as_scored"] is None
    # a flag of the data without data is not passed over
    code, text = prune(*words, file, "--max-length", 32, "--out", tmp_path / "e", data=False)
    assert code == 2 and "--data NAME=PATH" in text


def test_a_score_that_is_not_finite_or_no_number_is_refused_with_its_file_and_layer(prune, tmp_path):
    file, words = tmp_path / "scores.json", ("--keep", 1, "--score=size", "--scores")
    code, _ = prune(*words, file, "--out", tmp_path / "a")
    told = json.loads(file.read_text())
    told["units"][LAYERS[1]] = "HERE"
    bad = {"NaN": "is nan", "-Infinity": "is -inf", f"1{'0' * 400}": "is inf"}
    for value, reason in {**bad, '"7"': "is no number", "true": "is no number"}.items():
        file.write_text(json.dumps(told).replace('"HERE"', value))
        code, text = prune(*words, file, "--out", tmp_path / "b", data=False)
        named = f"{file}: the score of {LAYERS[1]} " if value in bad else f"{file}: holds no scores"
        assert code == 2 and named in text and reason in text, value
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("score", ["size", "ablation"])
def test_scores_of_a_mixture_that_has_lost_its_numbers_are_not_kept(score, prune, site, tmp_path):
    """Its base puts out what is no number from the second layer on."""
    broken = AutoModelForCausalLM.from_pretrained(site / "base", dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    words = ("--keep", 1, "--score", score, "--base-model", tmp_path / "broken")
    code, text = prune(*words, "--scores", tmp_path / "bad.json", "--out", tmp_path / "b")
    assert code == 2 and re.search(rf"the score of {LAYERS[score == 'size']} is (nan|inf)", text)
    assert not (tmp_path / "bad.json").exists() and not (tmp_path / "b").exists()


def test_it_is_told_what_is_done_and_how_much_of_it(site, tmp_path, capsys):
    """Of two layers by ablation 3 passes; 11 rows in batches of 4 are 3 batches."""
    rows = [f"--data={name}={site / 'data' / name}.jsonl" for name in ("sums", "words")]
    words = ["--max-loss-rise=0.01", "--score=ablation", "--batch-size=4", "--device=cpu"]
    assert main(["prune", str(site / "run"), *words, *rows, "--out", str(tmp_path / "less")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert "scoring 2 layers by ablation on 11 examples: 9 batches" in told
    assert "measuring the loss: 9 batches" in told
    (tries,) = [line for line in told if line.startswith("finding how many layers it takes: ")]
    assert int(tries.split()[-2]) >= 9, "with all, with one and with none"


def test_as_few_as_keep_the_loss_within_a_rise(prune, tmp_path):
    """Layer 0 says next to nothing, so the loss stays without it; without layer 1 it does not."""
    words = ("--score=size", "--json")
    code, text = prune("--max-loss-rise", 0.01, *words, "--out", tmp_path / "less")
    told = json.loads(text)
    assert code == 0 and told["kept"] == LAYERS[1:]
    assert told["losses"]["pruned"] - told["losses"]["full"] <= 0.01
    assert abs(told["losses"]["base"] - told["losses"]["full"]) > 0.01
    code, text = prune("--max-loss-rise", 50, *words, "--out", tmp_path / "none")
    assert code == 2 and "nothing would be left" in text and not (tmp_path / "none").exists()


def test_what_can_not_be_is_refused_before_the_base_is_loaded_where_that_is_known(prune, tmp_path, site):
    code, text = prune("--keep", 2, "--out", tmp_path / "out", "--score=size")
    assert code == 2 and "2 of 2 layers with mixers would be kept: nothing to prune" in text
    code, text = prune("--keep", 1, "--out", site / "run", data=False)
    assert code == 2 and "something else is there already" in text
    code, text = prune("--keep", 1, "--out", tmp_path / "out", data=False)
    assert code == 2 and "--data NAME=PATH" in text
    with pytest.raises(SystemExit):
        prune("--keep", 1, "--share", 0.5, "--out", tmp_path / "out")
    for flag, value in (("--keep", 0), ("--share", 1), ("--max-loss-rise", -1)):
        with pytest.raises(SystemExit):
            prune(flag, value, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_table_says_which_layers_stay(prune, tmp_path):
    code, text = prune("--keep", 1, "--score=size", "--out", tmp_path / "less")
    assert code == 0 and "weights: " in text and "with those kept" in text
    rows = {layer: next(line for line in text.splitlines() if layer in line) for layer in LAYERS}
    assert "yes" in rows[LAYERS[1]] and "yes" not in rows[LAYERS[0]]
    model, _ = load_mixture(tmp_path / "less")
    with torch.no_grad(), route_to(model, None):
        model(torch.arange(3, 9)[None])
