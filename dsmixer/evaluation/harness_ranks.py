"""What every rank of a run reads by itself, on its own machine, and has to find alike."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from dsmixer.config.errors import RunError, UserError
from dsmixer.evaluation.sharing import world

Result = TypeVar("Result")


def read_alike(read: Callable[[], Result], digest: Callable[[Result], str], where: str) -> Result:
    """Read on every rank; a collective, after which all ranks go on or all raise the same.

    Args:
        read: what each does; its result stays with its rank.
        digest: a short text that is the same where the results are.
        where: the place that an error about a difference names.

    Raises:
        UserError, RunError: on every rank, what the first of those that failed met, with its machine; or
            some have read other things.
    """
    if world()[1] == 1:
        return read()
    result, failure, found = None, None, None
    try:
        result = read()
        found = digest(result)
    except (UserError, RunError) as error:
        failure = (type(error), error.problem, error.where, error.fix)
    told: list[Any] = [None] * world()[1]
    dist.all_gather_object(told, (f"rank {world()[0]} ({socket.gethostname()})", failure, found))
    _raise_first(told)
    other = next((rank for rank, _, theirs in told if theirs != told[0][2]), None)
    if other is not None:
        problem = f"{told[0][0]} and {other} have read different records"
        raise UserError(problem, where=where, fix="give every machine the same files")
    assert result is not None
    return result


def _raise_first(told: list[Any]) -> None:
    failed = [(rank, failure) for rank, failure, _ in told if failure is not None]
    if not failed:
        return
    rank, (kind, problem, where, fix) = failed[0]
    if len(failed) < len(told):
        problem = f"{rank}: {problem}"
        fix = f"{fix or 'look there'}; as on the other machines (environment variables: docs/multi-node.md)"
    raise kind(problem, where=where, fix=fix)


def digest_of(records: Iterable[Mapping[str, Any]]) -> str:
    """Of records as JSON has them; of what it has not, the kind alone."""
    digest = hashlib.sha256()
    for record in records:
        text = json.dumps(record, sort_keys=True, default=lambda value: type(value).__name__)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
