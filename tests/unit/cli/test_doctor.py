"""``dsmixer doctor`` as a command: on this machine, and where something is broken. Nothing makes it raise."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from support.hub import serve_model
from support.launching import REPOSITORY
from support.small_disk import small_disk
from support.tiny import write_base, write_recipe

from dsmixer.cli.main import main
from dsmixer.training.machine.child import run_child
from dsmixer.training.machine.collective import check_ranks_meet, start_ranks
from dsmixer.training.machine.compiler import check_building
from dsmixer.training.machine.finding import Finding
from dsmixer.training.machine.host import check_host
from dsmixer.training.machine.hub import check_hub, hub_names
from dsmixer.training.machine.probe import STEPS
from dsmixer.training.machine.probing import Answer
from dsmixer.training.machine.recipe import check_loads, check_plan

COMMAND = [sys.executable, "-c", "import sys; from dsmixer.cli.main import main; sys.exit(main())", "doctor"]
"""As the installed script ``dsmixer doctor``."""


@dataclass(frozen=True)
class Outcome:
    """How a doctor ended."""

    returncode: int
    out: str
    err: str

    def one(self, check: str) -> dict[str, str | None]:
        """The finding of that check."""
        found = [f for f in json.loads(self.out)["findings"] if f["check"] == check]
        assert len(found) == 1, f"{check}: {found}\n{self.out}"
        return dict(found[0])

    def status(self, check: str) -> str | None:
        return self.one(check)["status"]


def doctor(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    within: Sequence[str] = (),
) -> Outcome:
    """Run the real command, on the CPU.

    Args:
        arguments: after ``dsmixer doctor``.
        environment: over that of this process.
        before: runs in its process before it starts.
        within: a command that runs another one.
    """
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [*within, *COMMAND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **(environment or {})},
        cwd=REPOSITORY,
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_a_machine_that_trains_is_well_and_the_recipe_fits(recipe: Path) -> None:
    done = doctor("--config", recipe, "--json")
    assert done.status("torch") in ("ok", "warning"), "its version may be another than the tested one"
    for check in ("Python", "compiler", "ninja", "4-bit bases", "localhost", "two ranks, gloo"):
        assert done.status(check) == "ok", done.one(check)
    assert done.status("recipe") == done.status("plan") == "ok"
    assert "3 experts on 2 ranks: replicate" in str(done.one("plan")["found"])
    assert "needed" in str(done.one("disk of run.dir")["found"])
    findings = json.loads(done.out)["findings"]
    statuses = {finding["status"] for finding in findings}
    assert json.loads(done.out)["status"] == ("problem" if "problem" in statuses else max(statuses))
    assert done.returncode == int("problem" in statuses)
    assert all((finding["fix"] is None) == (finding["status"] == "ok") for finding in findings)


def test_every_trouble_of_a_broken_machine_is_a_finding_with_a_fix(tmp_path: Path, recipe: Path) -> None:
    """No programs on PATH, a bitsandbytes that does not import, few open files, a variable of a launcher."""
    broken = tmp_path / "packages" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    path = os.pathsep.join((str(tmp_path / "packages"), str(REPOSITORY)))
    done = doctor(
        *("--config", recipe, "--json"),
        environment={"PATH": str(tmp_path), "PYTHONPATH": path, "RANK": "3", "CXX": "g++"},
        before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    assert done.returncode == 1
    for check, words in {
        "bitsandbytes": "libcudart",
        "compiler": "no g++",
        "ninja": "can't be started",
        "open files": "200 a process",
    }.items():
        found = done.one(check)
        assert found["status"] == "problem" and words in str(found["found"]) and found["fix"], found
    assert done.status("environment") == done.status("4-bit bases") == "warning"
    assert done.status("two ranks, gloo") == "ok"


def test_a_plan_that_does_not_fit_is_a_problem_with_what_would(recipe: Path) -> None:
    loaded, _ = check_loads(str(recipe), [])
    assert loaded is not None
    well = {step: Answer({}) for step in STEPS}
    given = {"answers": well, "ranks": 2, "model": "", "seconds": 120.0}
    _, found = check_plan(loaded, ["mixer.rank=64"], memory=10**6, **given)  # type: ignore[arg-type]
    assert found.status == "problem" and "does not fit" in found.found and "needs" in str(found.fix)
    gone = str(recipe.parent / "gone")
    needs, found = check_plan(loaded, [f"base.model={gone}"], memory=10**9, **given)  # type: ignore[arg-type]
    assert found.status == "problem" and gone in found.found and "--model-config" in str(found.fix)
    assert needs.run_bytes is None


def test_a_library_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """A torch whose import never ends."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import signal\nwhile True:\n    signal.pause()\n")
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    done = doctor("--timeout", "5", environment={"PYTHONPATH": path, "COLUMNS": "200"})
    assert done.returncode == 1
    lines = done.out.splitlines()
    torch = next(i for i, line in enumerate(lines) if line.split()[:2] == ["problem", "torch"])
    assert "no answer within 5 s" in lines[torch]
    fix = lines[torch + 1]
    assert fix.strip().startswith("Fix: pip install") and fix.index("Fix") == lines[torch].index("2.") + 2
    assert "not looked at, because torch fails" in done.out
    assert lines[-1].startswith("problem: ")


def test_warnings_count_with_strict_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Finding("shoes", "warning", "untied", "tie them")
    monkeypatch.setattr("dsmixer.cli.doctor.look", lambda args: iter([found]))
    assert main(["doctor"]) == 0 and main(["doctor", "--strict"]) == 1


@pytest.mark.parametrize(
    "arguments", [["--config", "nowhere.yaml"], ["run.seed=1"], ["--ranks", "0"], ["--nonsense"]]
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["doctor", *arguments])
    except SystemExit as stopped:  # argparse's own
        code = int(str(stopped.code))
    assert code == 2 and capsys.readouterr().err


def test_a_recipe_with_a_mistake_is_a_problem_with_its_place(recipe: Path) -> None:
    loaded, found = check_loads(str(recipe), ["mixer.rnak=4"])
    assert loaded is None and found.status == "problem"
    assert "mixer.rnak" in found.found and "mixer.rank" in str(found.fix)
    loaded, found = check_loads(str(recipe), ["stage1.enabled=false", "stage2.enabled=false"])
    assert loaded is None and found.status == "problem" and "both stages" in found.found


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk without a free byte."""
    with small_disk(tmp_path / "disk", "64k") as folder:
        with pytest.raises(OSError, match="space"):
            (folder / "filler").write_bytes(b"\0" * 2**20)
        yield folder


def test_a_full_disk_is_a_problem_for_runs_and_for_builds(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(full_disk / "extensions"))
    nothing = {step: Answer({}, "not asked") for step in ("torch", "ops")}
    compiler = next(f for f in check_building(nothing, 60) if f.check == "compiler")
    assert compiler.status == "problem" and "TORCH_EXTENSIONS_DIR" in str(compiler.fix)
    found = check_host(full_disk / "runs", 2, on_cpu=True, needed=None, download=0)
    disk = next(f for f in found if f.check == "disk of run.dir")
    assert disk.status == "problem" and str(full_disk) in disk.found


def test_only_names_of_the_hub_are_asked_for(tmp_path: Path, recipe: Path) -> None:
    loaded, _ = check_loads(str(recipe), [])
    assert loaded is not None and hub_names(loaded.recipe) == []
    values = yaml.safe_load(recipe.read_text())
    values["base"]["model"] = "owner/model"
    values["data"]["domains"][0]["train"] = values["data"]["domains"][0]["test"] = "owner/data@main"
    other = tmp_path / "recipe.yaml"
    other.write_text(yaml.safe_dump(values))
    loaded, _ = check_loads(str(other), [])
    assert loaded is not None
    assert hub_names(loaded.recipe) == [("model", "owner/model", ""), ("dataset", "owner/data", "main")]


def test_a_model_that_the_hub_has_can_be_had_and_an_unknown_one_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = write_base(tmp_path / "model")
    names = [("model", "owner/model", ""), ("model", "owner/other", "")]
    with serve_model(model, "owner/model") as (address, downloaded):
        monkeypatch.setenv("HF_ENDPOINT", address)
        findings = {f.status: f for f in check_hub(names, tmp_path / "cache", 60)}
    assert findings["ok"].found == "can be downloaded: owner/model"
    assert "owner/other" in findings["problem"].found and not downloaded


def test_a_gated_model_asks_for_an_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Gate(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this model is restricted.")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = HTTPServer(("127.0.0.1", 0), Gate)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    found = list(check_hub([("model", "owner/gated", "")], tmp_path / "cache", 60))
    server.shutdown()
    server.server_close()
    assert [f.status for f in found] == ["problem"] and "hf auth login" in str(found[0].fix)


def test_a_hub_out_of_reach_is_a_problem_unless_all_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    name, cache = ("model", "owner/model", ""), tmp_path / "cache"
    found = list(check_hub([name], cache, 60))
    assert [f.status for f in found] == ["problem"] and "can't be reached" in found[0].found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = list(check_hub([name], cache, 60))
    assert [f.status for f in found] == ["problem"] and "HF_HUB_OFFLINE" in str(found[0].fix)
    (cache / "models--owner--model" / "snapshots" / "0123").mkdir(parents=True)
    assert [f.status for f in check_hub([name], cache, 60)] == ["ok"]


def test_ranks_that_can_t_meet_are_not_waited_for() -> None:
    """In a network namespace without an interface that is up, where torch would try on and on."""
    alone = ["unshare", "--net", "--map-root-user"]
    if run_child([*alone, "true"], 20).trouble is not None:
        pytest.skip("no network namespace can be made here")
    done = doctor("--json", within=alone)
    assert done.returncode == 1 and done.status("localhost") == "problem"
    assert done.status("two ranks") == "warning" and done.one("two ranks")["fix"] == "see localhost"


def test_two_ranks_of_which_one_dies_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo is told of an interface that is not there: both ranks say so."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    torch = {"torch": Answer({"count": 0})}
    with ExitStack() as stack:
        ranks = [stack.enter_context(child) for child in start_ranks(120)]
        found = check_ranks_meet(ranks, torch)
    assert [f.status for f in found] == ["problem"] and "rank 0" in found[0].found
    assert "no-such-interface" in found[0].found and "GLOO_SOCKET_IFNAME" in str(found[0].fix)


def test_a_working_directory_that_is_gone_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = check_host(Path("runs"), 2, on_cpu=True, needed=None, download=0)
    assert next(f for f in found if f.check == "disk of run.dir").status == "problem"
