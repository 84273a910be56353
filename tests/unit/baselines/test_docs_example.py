"""The Python block of docs/baselines.md runs as it stands there, beside a small run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from support.launching import REPOSITORY
from support.tiny import byte_tokenizer, write_recipe

from dsmixer.adapters.mixture_folder import save_mixture
from dsmixer.adapters.peft_format import read_adapter
from dsmixer.baselines.merged import write_merged
from dsmixer.model.inject import Mixture

SIZES = {"sums": 12, "words": 8}


def write_run(folder: Path, mixture: Mixture) -> None:
    """What the example reads of a run folder; test rows are the training rows."""
    recipe = yaml.safe_load(write_recipe(folder / "source", sizes=SIZES).read_text())
    for domain in recipe["data"]["domains"]:
        domain["test"] = domain["train"]
    run = folder / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    save_mixture(mixture, run / "mixture", tokenizer=byte_tokenizer(), base=recipe["base"]["model"])


def test_the_example_of_the_page_runs(make_mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, make_mixture(experts=list(SIZES)))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/baselines.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/baselines.md", "exec"), names)
    compared = names["compared"]
    assert set(compared.costs) == {"own", "uniform", "arrow", "lorahub"}
    assert {row["domain"] for row in compared.rows} == set(SIZES)
    fitted = compared.fitted["lorahub"]
    write_merged(fitted.merged, names["mixture_of"](names["model"]), tmp_path / "lorahub")
    assert read_adapter(tmp_path / "lorahub").rank == 4
