"""How ranks are named in messages, and that one process has nobody to differ from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny import byte_tokenizer

from dsmixer.config.recipe import load_recipe
from dsmixer.data.readers import is_on_hub
from dsmixer.data.records import Example
from dsmixer.data.store import TokenStore
from dsmixer.data.tokenize import tokenize_examples
from dsmixer.training.nodes import fetch_on_nodes, tokenize_on_nodes
from dsmixer.training.ranks import check_ranks, check_shared_folder, installed_versions, named_ranks
from dsmixer.training.world import World

ALONE = World(0, 1, torch.device("cpu"))


def test_ranks_are_named_by_host_and_in_spans() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    assert named_ranks(hosts, [0, 1, 2, 3]) == "a (ranks 0-3)"
    assert named_ranks(hosts, [0, 2, 3, 5]) == "a (ranks 0, 2-3), b (rank 5)"


def test_a_thousand_hosts_are_not_all_named() -> None:
    text = named_ranks([f"node-{n}" for n in range(1000)], range(1000))
    assert text.endswith(" and 994 more hosts") and len(text) < 200


def test_the_versions_are_those_that_the_packages_have() -> None:
    versions = installed_versions()
    assert versions["torch"] == torch.__version__ and "no metadata" not in versions.values()


def test_one_process_says_its_line_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        json.dumps({"base": {"model": "x/y"}, "data": {"domains": [{"name": "a", "train": "b"}]}})
    )
    loaded = load_recipe(recipe)
    check_ranks(ALONE, loaded, (1, 2))
    check_shared_folder(ALONE, tmp_path / "runs" / "mine")
    fetch_on_nodes(ALONE, loaded.recipe)  # it would be downloaded where it is read
    examples = [Example("", "text", "a", location="f:1")]

    def tokenize(folder: str | Path | None) -> TokenStore:
        return tokenize_examples(examples, [0], byte_tokenizer(), max_length=16, cache_dir=folder)

    store = tokenize_on_nodes(ALONE, tokenize, None)
    assert len(store) == 1 and list(tmp_path.iterdir()) == [recipe]
    assert capsys.readouterr().out.startswith("rank 0 of 1: node rank 0 of 1 (")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("openai/gsm8k", True), ("gsm8k@main", True), ("./gsm8k", False), ("a/b/c", False), ("x.jsonl", False)],
)
def test_what_is_fetched_is_what_would_be_read_from_the_hub(source: str, expected: bool) -> None:
    assert is_on_hub(source) is expected
