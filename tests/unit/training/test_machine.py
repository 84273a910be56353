"""What the doctor makes of facts: GPUs, links, packages, limits. The facts are those that a machine gives."""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmixer.training.machine import host, network
from dsmixer.training.machine.child import Child, run_child
from dsmixer.training.machine.compiler import check_building
from dsmixer.training.machine.devices import check_devices, link_kinds
from dsmixer.training.machine.finding import Finding, ok, problem, warning, worst
from dsmixer.training.machine.probe import MARK, NF4_BOUND, STEPS
from dsmixer.training.machine.probing import Answer, Answers, collect, start_probe
from dsmixer.training.machine.software import check_software, compare, own_requirements, read_pins

GPU: dict[str, Any] = {
    "name": "NVIDIA H100",
    "capability": [9, 0],
    "total": 80 * 10**9,
    "free": 79 * 10**9,
    "error": None,
}
FACTS: dict[str, dict[str, Any]] = {
    "torch": {"version": "2.13.0", "cuda": "12.8", "count": 2},
    "devices": {"gpus": [GPU, GPU], "peers": [[True, True], [True, True]], "nccl": "2.27.5"},
    "deepspeed": {"accelerator": "cuda"},
    "ops": {"shared memory": True, "CPU Adam": True, "cuda_home": None},
    "nf4": {"device": "cuda", "error": 0.15, "bytes": 4096},
}
"""Of a machine with two GPUs."""

NO_GPU = {
    "torch": {"version": "2.13.0", "cuda": None, "count": 0},
    "devices": {"gpus": [], "peers": [], "nccl": None},
    "deepspeed": {"accelerator": "cpu"},
}

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tPIX\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPXB\tPIX\tSYS\t X

Legend:
  X    = Self
"""


def answers(changes: dict[str, dict[str, Any]] | None = None, **failed: str) -> Answers:
    """Of a healthy machine, but for some facts, and for steps that failed with some words."""
    facts = {**FACTS, **(changes or {})}
    made = {step: Answer(facts.get(step, {})) for step in STEPS}
    return {**made, **{step: Answer({}, words) for step, words in failed.items()}}


def one(findings: list[Finding], check: str) -> Finding:
    return next(finding for finding in findings if finding.check == check)


def script(folder: Path, name: str, text: str) -> None:
    """An executable of that name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_worst_of_the_findings_counts() -> None:
    good, so_so, bad = ok("a", ""), warning("b", "", "c"), problem("d", "", "e")
    assert worst([]) == worst([good]) == "ok"
    assert worst([good, so_so, good]) == "warning" and worst([so_so, bad, good]) == "problem"


@pytest.mark.parametrize(
    ("gpu", "status", "words"),
    [
        ({}, "ok", "79.00 GB free of 80.00 GB, bfloat16"),
        ({"free": 40 * 10**9}, "warning", "something else is on it"),
        ({"capability": [7, 5]}, "warning", "bfloat16 is emulated"),
        ({"error": "no kernel image is available"}, "problem", "no kernel image"),
    ],
)
def test_a_gpu_is_judged_by_what_it_can_do(gpu: dict[str, Any], status: str, words: str) -> None:
    facts = {"gpus": [GPU, {**GPU, **gpu}], "peers": [[True] * 2] * 2, "nccl": "2.27.5"}
    found = one(check_devices(answers({"devices": facts}), 20), "GPU 1")
    assert found.status == status and words in found.found
    assert (found.fix is None) == (status == "ok")


def test_gpus_that_do_not_reach_each_other_are_told() -> None:
    apart = {**FACTS["devices"], "peers": [[True, False], [False, True]]}
    found = one(check_devices(answers({"devices": apart}), 20), "links")
    assert found.status == "warning" and "2 can't reach" in found.found
    assert one(check_devices(answers(), 20), "links").status == "ok"


def test_links_are_counted_once_a_pair_and_without_network_cards() -> None:
    assert link_kinds(TOPOLOGY) == {"NV18": 1, "SYS": 2}
    assert not link_kinds("nvidia-smi: command failed")


def test_a_cpu_build_of_torch_beside_a_gpu_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin", "nvidia-smi", "echo 570.86.15; echo 570.86.15")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = one(check_devices(answers(NO_GPU), 20), "GPUs")
    assert found.status == "problem" and "570.86.15" in found.found and "CPU alone" in found.found
    cuda = {**NO_GPU, "torch": {"version": "2.13.0", "cuda": "12.8", "count": 0}}
    found = one(check_devices(answers(cuda), 20), "GPUs")
    assert found.status == "problem" and "sees none" in found.found and "driver" in str(found.fix)


def test_an_nf4_error_above_the_bound_is_a_problem() -> None:
    good = one(check_devices(answers(NO_GPU), 20), "4-bit bases")
    wrong = {**NO_GPU, "nf4": {"device": "cpu", "error": NF4_BOUND + 0.01, "bytes": 4096}}
    assert good.status == "ok"
    assert one(check_devices(answers(wrong), 20), "4-bit bases").status == "problem"
    nan = {**NO_GPU, "nf4": {"device": "cpu", "error": float("nan"), "bytes": 4096}}
    assert one(check_devices(answers(nan), 20), "4-bit bases").status == "problem"


def test_nvcc_of_another_cuda_than_torchs_is_told(tmp_path: Path) -> None:
    script(tmp_path / "bin", "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    other = answers({"ops": {**FACTS["ops"], "cuda_home": str(tmp_path)}})
    found = one(check_building(other, 60), "CUDA toolkit")
    assert found.status == "warning" and "11.8" in found.found and "12.8" in found.found
    script(tmp_path / "bin", "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    assert one(check_building(other, 60), "CUDA toolkit").status == "ok"
    assert one(check_building(answers(), 60), "CUDA toolkit").status == "warning"


def test_without_a_compiler_runs_fail_on_the_cpu_and_some_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in ("compiler", "ninja"):
        assert one(check_building(answers(NO_GPU), 20), check).status == "problem"
        assert one(check_building(answers(), 20), check).status == "warning"


def test_a_compiler_that_fails_is_told_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin", "broken", "echo 'small.cpp:1: fatal error: Python.h: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "broken"))
    found = one(check_building(answers(NO_GPU), 20), "compiler")
    assert found.status == "problem" and "Python.h" in found.found and "python3-dev" in str(found.fix)


def test_only_the_lock_of_a_build_that_is_over_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        assert one(check_building(answers(NO_GPU), 60), "op builds").status == "ok"
    found = one(check_building(answers(NO_GPU), 60), "op builds")
    assert found.status == "warning" and found.fix == f"run: rm {lock}"


def test_packages_are_held_against_each_others_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packages of which one wants another version of the other, and a third that is not there."""
    for name, version, needs in (("upper", "1.0", "lower>=2"), ("lower", "1.5", "absent-one")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {needs}\n"
        (folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    misfits, versions = compare(["upper", 'never; sys_platform == "plan9"', 'extra-only; extra == "docs"'])
    assert versions == {"upper": "1.0", "lower": "1.5"}
    assert [str(misfit) for misfit in misfits] == [
        "lower is 1.5, and upper needs >=2",
        "absent-one is not installed, and lower needs it",
    ]


def test_a_version_outside_the_requirement_is_a_problem_and_another_than_tested_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("peft", "0.1.0"), ("safetensors", "0.8.99")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    findings = check_software(answers())
    peft, safetensors = one(findings, "peft"), one(findings, "safetensors")
    assert peft.status == "problem" and "0.1.0" in peft.found and "dsmixer needs" in peft.found
    assert safetensors.status == "warning" and "safetensors==0.8" in str(safetensors.fix)
    assert one(findings, "torch").status == "ok"


def test_a_package_that_does_not_import_is_a_problem_with_its_last_words() -> None:
    findings = check_software(answers(bitsandbytes="OSError: libcudart.so.12: cannot open"))
    found = one(findings, "bitsandbytes")
    assert found.status == "problem" and "libcudart" in found.found and "--force-reinstall" in str(found.fix)


def test_requirements_and_pins_are_read_where_they_are_kept() -> None:
    wanted, python = own_requirements()
    assert any(text.startswith("deepspeed>=") for text in wanted) and python.startswith(">=3.")
    tested = read_pins(Path(__file__).parents[3] / "constraints.txt")
    assert tested["torch"].count(".") == 2 and "jinja2" in tested
    assert read_pins(Path("/nowhere/constraints.txt")) == {}


def test_a_launcher_of_another_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    script(folder, "deepspeed", "exit 0")
    monkeypatch.setenv("PATH", str(folder))
    assert one(check_software(answers()), "launcher").status == "ok", "a shim of a version manager"
    (folder / "deepspeed").write_text("#!/opt/other/bin/python3.11\nimport deepspeed\n")
    found = one(check_software(answers()), "launcher")
    assert found.status == "warning" and "/opt/other/bin" in found.found
    (folder / "deepspeed").write_text(f"#!{sys.executable}\nimport deepspeed\n")
    assert one(check_software(answers()), "launcher").status == "ok"
    (folder / "deepspeed").unlink()
    found = one(check_software(answers()), "launcher")
    assert found.status == "warning" and "activate" in str(found.fix)


def test_the_limit_of_a_control_group_counts_as_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.free_memory()[0] > 0
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    group = host._own_groups()[0]
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text("3000000000\n")
    (group / "memory.current").write_text("1000000000\n")
    assert host.free_memory() == (2_000_000_000, str(group))
    found = one(host.check_host(tmp_path, 2, on_cpu=True, needed=None, download=0), "memory")
    assert found.status == "warning" and "2.00 GB free" in found.found
    (group / "memory.max").write_text("max\n")
    assert host.free_memory()[1] is None


def test_shared_memory_and_disks_are_held_against_what_a_run_takes(tmp_path: Path) -> None:
    ranks = 10**6  # 69 TB of buffers
    found = host.check_host(tmp_path / "runs", ranks, on_cpu=True, needed=10**18, download=0)
    assert one(found, "/dev/shm").status == "problem" and "--shm-size" in str(one(found, "/dev/shm").fix)
    disk = one(found, "disk of run.dir")
    assert disk.status == "problem" and str(tmp_path) in disk.found and "run.dir" in str(disk.fix)
    assert not (tmp_path / "runs").exists(), "a doctor makes nothing"


def test_an_occupied_port_and_a_launchers_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(network, "LAUNCHER_PORT", taken.getsockname()[1])
        found = one(network.check_network(), "launcher's port")
        assert found.status == "warning" and "--master_port" in str(found.fix)
    assert one(network.check_network(), "localhost").status == "ok"
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = one(network.check_network(), "environment")
    assert found.status == "warning" and "WORLD_SIZE=8" in found.found and "unset" in str(found.fix)


def test_a_child_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """Its own child holds a pipe open, which is hung up only when that is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with Child(["sh", "-c", f"(echo begun; exec sleep 600) > {pipe} & wait"], 2.0) as child:
        ended = child.ended()
    assert ended.returncode is None and ended.trouble == "no answer within 2 s"
    assert os.read(reading, 100) == b"begun\n"
    poll = select.poll()
    poll.register(reading, select.POLLHUP)
    assert poll.poll(60_000) == [(reading, select.POLLHUP)]
    os.close(reading)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/nowhere/program"], "can't be started"),
        (["sh", "-c", "kill -SEGV $$"], "SIGSEGV"),
        (["sh", "-c", "echo first >&2; echo last words >&2; exit 3"], "last words"),
        (["sh", "-c", "exit 3"], "code 3"),
    ],
)
def test_what_a_child_met_is_said_in_a_line(command: list[str], words: str) -> None:
    assert words in str(run_child(command, 20).trouble)


def test_the_probe_goes_on_after_a_package_that_kills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A safetensors that ends the process, and a transformers that raises."""
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "__init__.py").write_text("import os\nos.abort()\n")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise RuntimeError('half an installation')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with start_probe(120) as child:
        found = collect(child, 120)
    assert set(found) == set(STEPS)
    assert "SIGABRT" in str(found["safetensors"].trouble)
    assert "half an installation" in str(found["transformers"].trouble)
    assert not found["torch"].failed and not found["devices"].failed


def test_weights_that_come_back_as_zeros_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes of our own that loses what it packs: the probe computes the error it makes."""
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "functional.py").write_text(
        "import torch\n"
        "def quantize_4bit(x, blocksize, quant_type): return x.to(torch.uint8), x.shape\n"
        "def dequantize_4bit(packed, shape): return torch.zeros(shape)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with start_probe(120, ["nf4"]) as child:
        out = child.ended().out
    assert MARK in out and '"error": 1.0' in out
