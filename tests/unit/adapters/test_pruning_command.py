"""``dsmixer prune``: scores, what is chosen by them, and a folder that the other commands take."""

from __future__ import annotations

import json
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
