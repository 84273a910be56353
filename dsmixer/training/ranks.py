"""What has to hold among the ranks of a run before it begins: one software, one recipe, one run folder.

Each check gathers a small object of every rank, so all ranks come to the same verdict and raise together.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
import time
import uuid
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dsmixer
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, flatten
from dsmixer.training.telling import tell
from dsmixer.training.world import World, gather_objects, node_rank, once

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "numpy",
    "tokenizers",
    "datasets",
    "pyarrow",
    "safetensors",
)
OWN_PATHS = ("run.dir", "data.cache_dir")
"""Keys that may differ between ranks: a shared folder may be mounted elsewhere on another node."""
SHOWN = 6
PATIENCE = 4.0
"""Seconds that a rank looks for a new file in a shared folder: a network file system may show it late."""


def check_ranks(world: World, loaded: LoadedRecipe, stages: Sequence[int]) -> None:
    """Say where each rank stands, and refuse ranks that differ in software or in what they were asked.

    Args:
        world: the ranks.
        loaded: the recipe as this rank has read it.
        stages: asked for in this call.

    Raises:
        UserError: on every rank, where two of them differ.
    """
    announce_rank(world)
    check_same_software(world)
    check_same_recipe(world, loaded, stages)


def announce_rank(world: World) -> None:
    """Print one line of this rank: its node, device, process and threads."""
    nodes = max(gather_objects(world, node_rank())) + 1
    device = str(world.device)
    if world.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(world.device)})"
    threads = torch.get_num_threads()
    parts = (
        f"rank {world.rank} of {world.size}: node rank {node_rank()} of {nodes} ({socket.gethostname()})",
        f"local rank {os.environ.get('LOCAL_RANK', '0')}",
        device,
        f"pid {os.getpid()}",
        f"{threads} thread{'s' * (threads > 1)}",
    )
    tell(", ".join(parts))  # in one piece: the ranks write to one terminal at once


def check_same_software(world: World) -> None:
    """Refuse ranks of another interpreter, other versions of the packages, or other sources of this one.

    Raises:
        UserError: names what differs, and where each version is.
    """
    if world.size == 1:
        return
    found = gather_objects(world, (socket.gethostname(), installed_versions()))
    differences = _differences([host for host, _ in found], [versions for _, versions in found])
    if differences:
        raise UserError(
            f"the ranks do not run the same software: {differences}",
            where="the environment of each node",
            fix="install the same set on every node (pip install -c constraints.txt …), or start all of them "
            "from one environment on a shared file system",
        )


def installed_versions() -> dict[str, str]:
    """Interpreter, packages and the sources of this one: what has to agree for ranks to compute alike."""
    versions = {"Python": f"{platform.python_implementation()} {platform.python_version()}"}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "no metadata"
    versions["CUDA of torch"] = str(torch.version.cuda)
    versions["dsmixer"] = f"{dsmixer.__version__} (sources {_source_digest()})"
    return versions


@functools.cache
def _source_digest() -> str:
    """A short digest of the package's files: two checkouts of one version are not the same software."""
    folder = Path(dsmixer.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def check_same_recipe(world: World, loaded: LoadedRecipe, stages: Sequence[int]) -> None:
    """Refuse ranks that were asked for something else, as when the command is given on each node by hand.

    Raises:
        UserError: names the keys.
    """
    if world.size == 1:
        return
    own = dict(flatten(loaded.recipe.model_dump(mode="json")))
    asked = {key: str(value) for key, value in own.items() if key not in OWN_PATHS}
    asked["--stages"] = ", ".join(map(str, stages))
    found = gather_objects(world, (socket.gethostname(), asked))
    differences = _differences([host for host, _ in found], [asked for _, asked in found])
    if differences:
        raise UserError(
            f"the ranks were given different recipes: {differences}",
            where=str(loaded.path),
            fix="give every node the same command, and the same recipe file",
        )


def _differences(hosts: Sequence[str], values: Sequence[Mapping[str, Hashable]]) -> str:
    """``KEY: VALUE on HOST (ranks 0-1), VALUE on HOST (ranks 2-3); …`` for keys that differ, or nothing."""
    told = []
    for key in dict.fromkeys(key for of_rank in values for key in of_rank):
        ranks_of: dict[Hashable, list[int]] = {}
        for rank, of_rank in enumerate(values):
            ranks_of.setdefault(of_rank.get(key, "nothing"), []).append(rank)
        if len(ranks_of) > 1:
            shown = [f"{value} on {named_ranks(hosts, ranks)}" for value, ranks in ranks_of.items()]
            more = len(shown) - SHOWN
            told.append(
                f"{key}: " + ", ".join(shown[:SHOWN]) + (f" and {more} more values" if more > 0 else "")
            )
    more = len(told) - SHOWN
    return "; ".join(told[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def named_ranks(hosts: Sequence[str], ranks: Sequence[int]) -> str:
    """``node-a (ranks 0-3), node-b (rank 4)``: ranks by their host, a few hosts at most.

    Args:
        hosts: of every rank of the world.
        ranks: those to name, ascending.
    """
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank], []).append(rank)
    shown = [f"{host} (rank{'s' * (len(own) > 1)} {_spans(own)})" for host, own in of_host.items()]
    more = len(shown) - SHOWN
    return ", ".join(shown[:SHOWN]) + (f" and {more} more hosts" if more > 0 else "")


def _spans(ranks: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


@dataclass(frozen=True)
class _Token:
    """A file that rank 0 has put into the folder nearest to the run folder that exists.

    Attributes:
        name: of the file, used once.
        levels: how far above the run folder it lies, 0 for in it.
        text: what is in it.
    """

    name: str
    levels: int
    text: str

    def path(self, folder: Path) -> Path:
        """Where a rank whose run folder is ``folder`` has to find it."""
        return [folder.absolute(), *folder.absolute().parents][self.levels] / self.name


def check_shared_folder(world: World, folder: Path) -> None:
    """Refuse a run folder that is not one folder for all ranks: they would save and resume apart.

    Rank 0 puts a small file beside where the run folder is or will be; every rank looks for it under the path
    that the folder has for itself. The file is removed again, and no folder is made.

    Args:
        world: the ranks.
        folder: the run folder, which need not exist.

    Raises:
        UserError: names the hosts that do not see the file, or it can't be written.
    """
    if world.size == 1:
        return
    token = once(world, lambda: _put_token(folder))
    try:
        own = (socket.gethostname(), str(folder.absolute()), _sees(token, folder))
        found = gather_objects(world, own)
    finally:
        if world.rank == 0:
            token.path(folder).unlink(missing_ok=True)
    blind = [rank for rank, (_, _, seen) in enumerate(found) if not seen]
    if blind:
        hosts, paths = [host for host, _, _ in found], [path for _, path, _ in found]
        there = list(dict.fromkeys(paths[rank] for rank in blind))[:SHOWN]
        raise UserError(
            f"the run folder is not one folder for all ranks: a file that {hosts[0]} (rank 0) wrote there is "
            f"not seen on {named_ranks(hosts, blind)}, where it is {' or '.join(there)}",
            where=f"run.dir: {paths[0]}",
            fix="set run.dir to a folder on a file system that every node mounts, and start every node in "
            "the same working directory or give an absolute path",
        )


def _put_token(folder: Path) -> _Token:
    """Raises OSError where the file can't be written."""
    there, levels = folder.absolute(), 0
    while not there.is_dir():
        there, levels = there.parent, levels + 1
    token = _Token(f".dsmixer-{uuid.uuid4().hex}", levels, uuid.uuid4().hex)
    path = token.path(folder)
    try:
        path.write_text(token.text, encoding="utf-8")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return token


def _sees(token: _Token, folder: Path) -> bool:
    """Whether this rank finds the file, with a little patience."""
    until = time.monotonic() + PATIENCE
    while True:
        if _read(token.path(folder)) == token.text:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.25)


def _read(path: Path) -> Any:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
