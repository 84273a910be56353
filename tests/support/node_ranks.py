"""One rank of ``dist/test_two_launchers.py``: what the checks between ranks and the work once a node come to.

    deepspeed ... node_ranks.py FOLDER RECIPE [section.key=value ...]

Each rank leaves ``FOLDER/rank-N.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe
from dsmixer.data.records import Example
from dsmixer.data.tokenize import tokenize_examples
from dsmixer.training.nodes import fetch_on_nodes, tokenize_on_nodes
from dsmixer.training.ranks import check_same_recipe, check_same_software, check_shared_folder
from dsmixer.training.world import first_on_node, join_world, node_rank
from support.tiny import byte_tokenizer

TEXTS = ["one", "two and a half", "three"]


class ListeningTokenizer(PreTrainedTokenizerFast):
    """Remembers whether it was asked for the tokens of the last text."""

    asked = False

    def __call__(self, *args: Any, **how: Any) -> Any:
        ListeningTokenizer.asked |= TEXTS[-1] in str(args)
        return super().__call__(*args, **how)


def said(work: Callable[[], Any]) -> str:
    """The message that the work ends with, or nothing."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path, recipe: str, overrides: list[str]) -> None:
    world = join_world(60.0)
    loaded = load_recipe(recipe, overrides)
    found: dict[str, Any] = {
        "software": said(lambda: check_same_software(world)),
        "recipe": said(lambda: check_same_recipe(world, loaded, (1, 2))),
        "relative": said(lambda: check_shared_folder(world, Path("runs/mine"))),
        "shared": said(lambda: check_shared_folder(world, folder / "not" / "made" / "yet")),
        "order": in_order(world, folder),
        "one_fails": said(lambda: first_on_node(world, fail_on_node_1)),
        "tokens": tokens(world, None),
        "cached": tokens(world, folder / "cache"),
        "cached_again": tokens(world, folder / "cache"),
        "bad_text": said(lambda: tokenize(world, ["x", ""], None)),
        "download": said(lambda: fetch_on_nodes(world, loaded.recipe)),
    }
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def in_order(world: Any, folder: Path) -> list[str]:
    """What a rank does and what it finds done: the first of a node is through before the others begin."""
    mark = folder / f"node-{node_rank()}"

    def first() -> list[str]:
        found = ["first", str(mark.exists())]
        mark.write_text("done")
        return found

    return first_on_node(world, first, lambda: ["other", str(mark.exists())])


def fail_on_node_1() -> None:
    if node_rank() == 1:
        raise UserError("the disk of node 1 is full", where="somewhere", fix="free space")


def tokenize(world: Any, texts: list[str], cache: Path | None) -> Any:
    tokenizer = byte_tokenizer()
    listening = ListeningTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    examples = [Example("", text, "a", location=f"f:{i}") for i, text in enumerate(texts)]
    ids = [0] * len(texts)

    def work(folder: str | Path | None) -> Any:
        return tokenize_examples(examples, ids, listening, max_length=32, cache_dir=folder)

    return tokenize_on_nodes(world, work, cache)


def tokens(world: Any, cache: Path | None) -> dict[str, Any]:
    ListeningTokenizer.asked = False
    store = tokenize(world, TEXTS, cache)
    ids = [store.input_ids(i).tolist() for i in range(len(store))]
    return {"ids": ids, "asked": ListeningTokenizer.asked}


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(Path(arguments[0]), arguments[1], arguments[2:])
