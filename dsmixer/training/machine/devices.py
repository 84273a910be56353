"""GPUs, the links between them, and whether 4-bit weights survive on the device that trains."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dsmixer.placement.reason import amount
from dsmixer.training.machine.child import run_child
from dsmixer.training.machine.finding import Finding, ok, problem, warning
from dsmixer.training.machine.probe import NF4_BOUND
from dsmixer.training.machine.probing import Answers

BUSY_SHARE = 0.9
"""Of a GPU's memory: less free than this, and somebody else is on it."""

LINKS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "PCIe host bridges of one NUMA node",
    "SYS": "the link between CPUs",
}
"""What ``nvidia-smi topo -m`` calls the ways between two GPUs, the fastest first."""


def check_devices(answers: Answers, seconds: float) -> list[Finding]:
    """Every GPU, the driver, the links, and a round trip through NF4.

    Args:
        answers: of the probe.
        seconds: how long nvidia-smi may take.
    """
    driver = _driver(seconds)
    found = list(_gpus(answers, driver))
    gpus = answers["devices"].facts.get("gpus", [])
    if len(gpus) > 1:
        found.append(_links(answers, seconds))
    return [*found, _four_bit(answers)]


def _driver(seconds: float) -> tuple[int, str]:
    """GPUs that the driver knows, and its version; 0 and why not where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    ended = run_child(command, seconds)
    lines = [line.strip() for line in ended.out.splitlines() if line.strip()]
    if ended.trouble is not None or not lines:
        return 0, ended.trouble or "nvidia-smi names no GPU"
    return len(lines), lines[0]


def _gpus(answers: Answers, driver: tuple[int, str]) -> Iterator[Finding]:
    if answers["torch"].failed:
        yield warning("GPUs", "not looked at, because torch fails", "see torch")
        return
    if answers["devices"].failed:
        fix = "see what nvidia-smi says; restart the machine, or the container with --gpus all"
        yield problem("GPUs", f"torch fails on them: {answers['devices'].trouble}", fix)
        return
    gpus = answers["devices"].facts["gpus"]
    if not gpus:
        yield _no_gpu(answers, driver)
        return
    for index, gpu in enumerate(gpus):
        yield _gpu(index, gpu, driver[1])
    accelerator = answers["deepspeed"].facts.get("accelerator")
    if accelerator == "cpu":
        fix = "unset DS_ACCELERATOR, unless runs on the CPU are meant"
        yield warning("accelerator", "there are GPUs, and DeepSpeed will train on the CPU", fix)


def _no_gpu(answers: Answers, driver: tuple[int, str]) -> Finding:
    cuda = answers["torch"].facts["cuda"]
    if driver[0] and cuda is None:
        found = f"the driver ({driver[1]}) knows {driver[0]}, and torch is built for the CPU alone"
        return problem("GPUs", found, "install torch for CUDA: see https://pytorch.org/get-started/locally")
    if driver[0]:
        found = f"the driver ({driver[1]}) knows {driver[0]}, and torch, built for CUDA {cuda}, sees none"
        fix = "check CUDA_VISIBLE_DEVICES; install a driver for that CUDA, or a torch for this driver"
        return problem("GPUs", found, fix)
    if answers["deepspeed"].facts.get("accelerator") in ("cpu", None):
        return ok("GPUs", "none: runs are on the CPU (export DS_ACCELERATOR=cpu)")
    fix = "export DS_ACCELERATOR=cpu, or start the container with --gpus all"
    return problem("GPUs", "none, and DeepSpeed wants one", fix)


def _gpu(index: int, gpu: Mapping[str, Any], driver: str) -> Finding:
    check, capability = f"GPU {index}", tuple(gpu["capability"])
    label = f"{gpu['name']}, compute capability {capability[0]}.{capability[1]}, driver {driver}"
    if gpu["error"] is not None:
        fix = "install a torch that is built for this GPU and driver; end what else runs on it (nvidia-smi)"
        return problem(check, f"{label}: {gpu['error']}", fix)
    found = f"{label}, {amount(gpu['free'])} free of {amount(gpu['total'])}"
    if capability < (8, 0):
        fix = "use a GPU of compute capability 8.0 or later, or base.dtype: float32"
        return warning(check, f"{found}: bfloat16 is emulated, and slow", fix)
    if gpu["free"] < BUSY_SHARE * gpu["total"]:
        return warning(check, f"{found}: something else is on it", "end it: nvidia-smi names the processes")
    return ok(check, f"{found}, bfloat16")


def _links(answers: Answers, seconds: float) -> Finding:
    facts = answers["devices"].facts
    peers, nccl = facts["peers"], f"NCCL {facts['nccl']}"
    ended = run_child(["nvidia-smi", "topo", "-m"], seconds)
    ways = link_kinds(ended.out)
    told = ", ".join(f"{_way(kind)} ({count})" for kind, count in ways.most_common()) or "nvidia-smi: nothing"
    apart = sum(not reached for row in peers for reached in row)
    if apart:
        fix = "runs work and go through the host's memory; NCCL_P2P_LEVEL and the BIOS (ACS, IOMMU) decide"
        found = f"{nccl}; of the pairs, {apart} can't reach each other's memory; {told}"
        return warning("links", found, fix)
    return ok("links", f"{nccl}; every GPU reaches the others' memory; {told}")


def link_kinds(matrix: str) -> Counter[str]:
    """How many pairs of GPUs are linked in which way, from what ``nvidia-smi topo -m`` prints."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines()]
    rows = [row for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0])]
    of_gpus = [row[1:] for row in rows if not row[1].startswith("GPU")]  # the first line names the columns
    return Counter(row[j] for i, row in enumerate(of_gpus) for j in range(i + 1, len(of_gpus)))


def _way(kind: str) -> str:
    meaning = next((text for short, text in LINKS.items() if kind.startswith(short)), None)
    return kind if meaning is None else f"{kind}, {meaning}"


def _four_bit(answers: Answers) -> Finding:
    answer = answers["nf4"]
    if answer.needed is not None:
        return warning("4-bit bases", f"{answer.trouble}", f"see {answer.needed}")
    fix = "install the bitsandbytes of constraints.txt; python -m bitsandbytes says what it lacks here"
    if answer.failed:
        return problem("4-bit bases", f"bitsandbytes can't pack a weight: {answer.trouble}", fix)
    error, device = answer.facts["error"], answer.facts["device"]
    found = f"NF4 on {device}: a weight comes back within {error:.4f} of its block's largest"
    if not error <= NF4_BOUND:
        return problem("4-bit bases", f"{found}, and {NF4_BOUND} is the most that NF4 allows", fix)
    return ok("4-bit bases", f"{found} (bound {NF4_BOUND})")
