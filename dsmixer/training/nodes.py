"""What each node does once for all its ranks: downloads and tokenisation."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmixer.adapters.sources import adapter_folder
from dsmixer.config.schema import DomainConfig, Recipe
from dsmixer.data.readers import fetch_source
from dsmixer.data.store import TokenStore
from dsmixer.model.load import fetch_base
from dsmixer.training.world import World, first_on_node, gather_objects, is_first_on_node, node_rank


def fetch_on_nodes(world: World, recipe: Recipe) -> None:
    """Download the base, the adapters and the data sets that the recipe names on the hub, once a node.

    Afterwards every rank finds them in the node's cache. One process downloads them where it reads them.

    Raises:
        UserError: something can't be had; on every rank.
    """
    if world.size > 1:
        first_on_node(world, lambda: _fetch(recipe), lambda: None)


def _fetch(recipe: Recipe) -> None:
    fetch_base(recipe.base)
    for expert in recipe.mixer.experts or ():
        if expert.path is not None:
            adapter_folder(expert.path)
    data = recipe.data
    for entry in data.domains if data.source is None else (data.source,):
        fetch_source(entry.train, split=entry.split_train, subset=entry.subset)
        if entry.test is not None:
            own = entry.subset_test if isinstance(entry, DomainConfig) else None
            fetch_source(entry.test, split=entry.split_test, subset=own or entry.subset)
    if recipe.stage2.enabled and recipe.stage2.data.source is not None:
        fetch_source(recipe.stage2.data.source)


def tokenize_on_nodes(
    world: World, tokenize: Callable[[str | Path | None], TokenStore], cache_dir: str | Path | None
) -> TokenStore:
    """Tokenise once a node; the other ranks map the file that its first rank has written.

    Without ``cache_dir`` the file lies in a temporary folder that is gone when all ranks have it open: the
    tokens are then in memory once a node. One process without ``cache_dir`` writes no file.

    Args:
        world: the ranks.
        tokenize: ``tokenize_examples`` with all but its ``cache_dir``, which it is given.
        cache_dir: of the recipe.

    Raises:
        UserError: as ``tokenize_examples``; on every rank.
    """
    if world.size == 1 or cache_dir is not None:
        return first_on_node(world, lambda: tokenize(cache_dir))
    with _folder_of_node(world) as folder:
        return first_on_node(world, lambda: tokenize(folder))


@contextmanager
def _folder_of_node(world: World) -> Iterator[str]:
    """A temporary folder that the ranks of a node share, removed when all have left."""
    made = first_on_node(world, lambda: tempfile.mkdtemp(prefix="dsmixer-tokens-"), lambda: "")
    paths = {node: path for node, path in gather_objects(world, (node_rank(), made)) if path}
    try:
        yield paths[node_rank()]
        gather_objects(world, None)  # a file that every rank has mapped can lose its name
    finally:
        if is_first_on_node():
            shutil.rmtree(made, ignore_errors=True)
