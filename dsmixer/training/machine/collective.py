"""Two real processes that meet on this machine and exchange numbers, as the ranks of a run do."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from dsmixer.training.machine.child import Child, Ended, python_child
from dsmixer.training.machine.finding import Finding, ok, problem, warning
from dsmixer.training.machine.network import free_port
from dsmixer.training.machine.probing import Answers

MODULE = "dsmixer.training.machine.two_ranks"
CHECK = "two ranks"
AFTER_THE_FIRST = 5.0
"""Seconds that a rank may take to end when the other has."""


def start_ranks(seconds: float) -> list[Child]:
    """Begin with two ranks, without waiting; none where no port can be had.

    Args:
        seconds: how long they may take; a collective gives up a little before.
    """
    port = free_port()
    if port is None:
        return []
    return [python_child(MODULE, [str(rank), str(port), str(0.8 * seconds)], seconds) for rank in (0, 1)]


def check_ranks_meet(children: Sequence[Child], answers: Answers) -> list[Finding]:
    """What became of the two ranks.

    Args:
        children: from ``start_ranks``.
        answers: of the probe.
    """
    if answers["torch"].failed:
        return [warning(CHECK, "not looked at, because torch fails", "see torch")]
    if not children:
        return [warning(CHECK, "not looked at, because no port of localhost can be reached", "see localhost")]
    _end_with_the_first(children)
    ended = [child.ended() for child in children]
    gpus = int(answers["torch"].facts["count"])
    backends = ["gloo"] + (["NCCL"] if gpus > 1 else [])
    return [_judged(backend, ended) for backend in backends]


def _end_with_the_first(children: Sequence[Child]) -> None:
    """Wait until a rank has ended; the others have nobody to talk to then, and little more to do."""
    while all(child.running() for child in children):
        time.sleep(0.02)
    for child in children:
        child.hurry(AFTER_THE_FIRST)


def _judged(backend: str, ended: Sequence[Ended]) -> Finding:
    told = [_told(backend, rank.out) for rank in ended]
    check = f"{CHECK}, {backend}"
    done = [answer for answer in told if answer is not None]
    if len(done) == len(told):
        if all(right for right, _ in done):
            return ok(check, f"they met and exchanged numbers in {max(took for _, took in done):.2f} s")
        return problem(check, "the numbers came out wrong", _fix(backend))
    reasons = [f"rank {i}: {rank.trouble or 'no answer'}" for i, rank in enumerate(ended) if told[i] is None]
    return problem(check, "; ".join(reasons), _fix(backend))


def _told(backend: str, out: str) -> tuple[bool, float] | None:
    """Whether the numbers were right, and the seconds; None where the rank did not get so far."""
    for line in out.splitlines():
        if line.startswith('{"backend"'):
            told = json.loads(line)
            if told["backend"] == backend:
                return bool(told["right"]), float(told["seconds"])
    return None


def _fix(backend: str) -> str:
    if backend == "NCCL":
        return "set NCCL_DEBUG=INFO to see where it stops; NCCL_P2P_DISABLE=1 tells whether it is the link"
    return "check the firewall on the loopback interface, and GLOO_SOCKET_IFNAME if it is set"
