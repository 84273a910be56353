"""Two launchers of two ranks, as on two nodes, against one launcher of four; and what ranks must agree on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import node_ranks
from support.comparing import LOSS, RunRecord
from support.hub import serve_model
from support.launching import REPOSITORY, TIMEOUT_SECONDS, Launched, Node, launch, launch_nodes
from support.tiny import byte_tokenizer, write_recipe

pytestmark = pytest.mark.timeout(4 * TIMEOUT_SECONDS)

TRAIN = REPOSITORY / "launch" / "train.py"
STEPS = (
    "stage1.max_steps=3",
    "stage2.max_steps=3",
    "placement.mode=tokens",
    "placement.expert_parallel_size=4",
)
"""Tokens travel between the launchers, too."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def two_launchers(recipe: Path) -> Sequence[Launched]:
    node = Node(["--config", str(recipe), "run.name=two", *STEPS])
    return [launched.check() for launched in launch_nodes(TRAIN, [node, node], ranks=2)]


def test_two_launchers_of_two_ranks_give_the_losses_of_one_of_four(
    recipe: Path, two_launchers: Sequence[Launched]
) -> None:
    launch(TRAIN, ["--config", str(recipe), "run.name=one", *STEPS], ranks=4).check()
    one, two = (RunRecord(recipe.parent / "runs" / name) for name in ("one", "two"))
    assert [(row["stage"], row["step"]) for row in two.rows] == [(s, n) for s in (1, 2) for n in (1, 2, 3)]
    for name in ("loss", "task_loss", "grad_norm"):
        torch.testing.assert_close(two.column(name), one.column(name), rtol=LOSS, atol=0.0)


def test_every_rank_says_where_it_stands(two_launchers: Sequence[Launched]) -> None:
    for node, launched in enumerate(two_launchers):
        lines = sorted(line for line in launched.output.splitlines() if line.startswith("rank "))
        assert len(lines) == 2
        for local, line in enumerate(lines):
            assert line.startswith(f"rank {2 * node + local} of 4: node rank {node} of 2 (")
            assert f", local rank {local}, cpu, pid " in line and line.endswith(", 1 thread")


def test_a_run_folder_that_the_nodes_do_not_share_is_refused_once_a_node(
    recipe: Path, tmp_path: Path
) -> None:
    """A relative run.dir in two working directories; the main command, one rank a node."""
    nodes = []
    for name in ("home-a", "home-b"):
        (tmp_path / name).mkdir()
        nodes.append(Node(["--config", str(recipe), "run.dir=runs"], cwd=tmp_path / name))
    for launched in launch_nodes(TRAIN, nodes, ranks=1):
        assert launched.returncode == 2, launched.output[-4000:]
        assert launched.output.count("dsmixer: error: ") == 1
        assert "the run folder is not one folder for all ranks" in launched.output
        assert "Traceback" not in launched.output
    assert not list(tmp_path.glob("home-*/*")), "something was left"


class Ranks:
    """What ``node_ranks.py`` found on two nodes of two ranks that differ in everything checked."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.base = folder, recipe.parent / "llama"
        nodes = []
        with serve_model(self.base, "someone/tiny") as (address, self.downloaded):
            for node, version in enumerate(("0.19.0", "0.20.0")):
                own = folder / f"home-{node}"
                for path in (own / "tmp", own / f"packages/peft-{version}.dist-info"):
                    path.mkdir(parents=True)
                metadata = f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n"
                (own / f"packages/peft-{version}.dist-info/METADATA").write_text(metadata)
                path = os.pathsep.join(
                    [str(own / "packages"), str(REPOSITORY), str(Path(node_ranks.__file__).parents[1])]
                )
                environment = {
                    "PYTHONPATH": path,
                    "TMPDIR": str(own / "tmp"),
                    "HF_HOME": str(own / "hub"),
                    "HF_ENDPOINT": address,
                    "HF_HUB_OFFLINE": "0",
                }
                arguments = [str(folder), str(recipe), "base.model=someone/tiny", f"stage1.epochs={1 + node}"]
                nodes.append(Node(arguments, environment, own))
            launched = launch_nodes(Path(node_ranks.__file__), nodes, ranks=2)
        for node_launched in launched:
            node_launched.check()
        self.found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]

    def all_say(self, key: str) -> str:
        """The one message of every rank."""
        messages: set[str] = {found[key] for found in self.found}
        assert len(messages) == 1, messages
        return messages.pop()

    def column(self, key: str, inner: str) -> list[Any]:
        return [found[key][inner] for found in self.found]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"), recipe)


def test_another_version_of_a_package_on_one_node_is_named_with_its_ranks(ranks: Ranks) -> None:
    message = ranks.all_say("software")
    assert "the ranks do not run the same software: peft: 0.19.0 on " in message
    assert "(ranks 0-1), 0.20.0 on " in message and "(ranks 2-3)" in message
    assert ";" not in message.split("\n")[0], "nothing else differs"


def test_another_value_in_one_node_s_command_is_named_with_its_ranks(ranks: Ranks) -> None:
    message = ranks.all_say("recipe")
    assert "stage1.epochs: 1 on " in message and "(ranks 0-1), 2 on " in message and "(ranks 2-3)" in message
    assert ";" not in message.split("\n")[0], "nothing else differs"


def test_only_the_ranks_that_do_not_see_the_folder_are_named_and_nothing_is_left(ranks: Ranks) -> None:
    message = ranks.all_say("relative")
    assert (
        "(ranks 2-3), where it is " in message and str(ranks.folder / "home-1" / "runs" / "mine") in message
    )
    assert ranks.all_say("shared") == ""
    assert not (ranks.folder / "not").exists()
    assert not list(ranks.folder.rglob(".dsmixer-*"))


def test_the_first_rank_of_each_node_is_through_before_the_others_begin(ranks: Ranks) -> None:
    orders = [found["order"] for found in ranks.found]
    assert orders == [["first", "False"], ["other", "True"]] * 2


def test_the_mistake_of_one_node_s_first_rank_reaches_every_rank(ranks: Ranks) -> None:
    assert ranks.all_say("one_fails") == "somewhere: the disk of node 1 is full\n  Fix: free space"
    assert "f:1: no token to learn is left" in ranks.all_say("bad_text")


def test_one_rank_a_node_tokenises_and_the_others_read_its_tokens(ranks: Ranks) -> None:
    tokenizer = byte_tokenizer()
    want = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in node_ranks.TEXTS]
    for key in ("tokens", "cached", "cached_again"):
        assert ranks.column(key, "ids") == [want] * 4
    assert ranks.column("tokens", "asked") == [True, False, True, False]
    assert ranks.column("cached_again", "asked") == [False] * 4, "the cache is there"
    assert not any(any((ranks.folder / f"home-{node}" / "tmp").glob("dsmixer-*")) for node in range(2))
    assert len(list((ranks.folder / "cache").iterdir())) == 1


def test_a_base_of_the_hub_is_downloaded_once_a_node(ranks: Ranks) -> None:
    assert ranks.all_say("download") == ""
    assert sorted(ranks.downloaded) == sorted(2 * os.listdir(ranks.base))
