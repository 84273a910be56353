"""The wrapper around a launcher, with stand-ins for launcher and rank that are real processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import REPOSITORY

SUPERVISE = REPOSITORY / "launch" / "supervise.py"

LAUNCHER = """#!/usr/bin/env bash
# counts its starts, starts two ranks, notes a signal that it should not get, ends with the first one's code
echo x >>"$FOLDER/starts"
trap 'echo heard >"$FOLDER/wrong"' TERM INT
for rank in 0 1; do
    RANK=$rank LOCAL_RANK=$rank "$FOLDER/rank" "$@" & ranks+=($!)
done
[[ "$1" == orphans ]] && { read -r <"$FOLDER/ready"; exit 0; }
wait "${ranks[0]}"
code=$?
while kill -0 "${ranks[0]}" 2>/dev/null; do wait "${ranks[0]}"; code=$?; done
exit $code
"""
RANK = """#!/usr/bin/env bash
# "ends CODE": at once; "waits": until it is told to stop, then 75; "fails-once": 1 at the first start, then 0
case "$1" in
ends) exit "$2" ;;
fails-once) exit $(( $(wc -l <"$FOLDER/starts") == 1 )) ;;
*)
    trap 'exit 75' TERM
    # ready once both would hear a signal
    if [[ "$RANK" == 0 ]]; then read -r <"$FOLDER/up"; echo >"$FOLDER/ready"; else echo >"$FOLDER/up"; fi
    read -r <"$FOLDER/never"
    ;;
esac
"""


class Wrapper:
    """The wrapper over the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("launcher", LAUNCHER), ("rank", RANK)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for name in ("up", "ready", "never"):
            os.mkfifo(folder / name)

    def start(self, *arguments: str, flags: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, str(SUPERVISE), "--pause", "0.01", *flags, "--"]
        return subprocess.Popen(
            [*command, str(self.folder / "launcher"), *arguments],
            env={**os.environ, "FOLDER": str(self.folder), "RANK": "7", "LOCAL_RANK": "7"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, flags: tuple[str, ...] = ()) -> tuple[int, str]:
        process = self.start(*arguments, flags=flags)
        errors = process.communicate()[1]
        return process.returncode, errors

    @property
    def starts(self) -> int:
        return len((self.folder / "starts").read_text().splitlines())


@pytest.fixture
def wrapper(tmp_path: Path) -> Wrapper:
    return Wrapper(tmp_path)


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_or_wrong_input_is_not_started_again(wrapper: Wrapper, code: int) -> None:
    assert wrapper.run("ends", str(code)) == (code, "")
    assert wrapper.starts == 1


def test_what_failed_is_started_again_a_bounded_number_of_times(wrapper: Wrapper) -> None:
    code, errors = wrapper.run("ends", "247", flags=("--restarts", "2"))
    assert (code, wrapper.starts) == (247, 3)
    lines = errors.splitlines()
    assert lines[0].startswith(
        "supervise: the launcher ended with 247 (a process was killed by SIGKILL) after "
    )
    assert (
        "restart 1 of 2" in lines[0]
        and "restart 2 of 2" in lines[1]
        and "no restart is left of 2" in lines[2]
    )


def test_a_run_that_fails_once_is_brought_to_its_end(wrapper: Wrapper) -> None:
    code, errors = wrapper.run("fails-once")
    assert (code, wrapper.starts) == (0, 2) and "1 (a rank failed)" in errors


def test_a_stop_by_somebody_else_is_gone_on_from(wrapper: Wrapper) -> None:
    code, errors = wrapper.run("ends", "75", flags=("--restarts", "1"))
    assert (code, wrapper.starts) == (75, 2) and "somebody else stopped a rank" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_ranks_and_not_to_the_launcher(wrapper: Wrapper, number: signal.Signals) -> None:
    process = wrapper.start("waits")
    (wrapper.folder / "ready").read_text()
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 75 and wrapper.starts == 1
    assert errors.startswith("supervise: told 2 ranks to save and stop (pids ") and errors.count("\n") == 1
    assert not (wrapper.folder / "wrong").exists()


def test_a_stop_file_has_the_effect_of_a_signal(wrapper: Wrapper) -> None:
    stop = wrapper.folder / "stop"
    process = wrapper.start("waits", flags=("--stop-file", str(stop)))
    (wrapper.folder / "ready").read_text()
    stop.touch()
    assert "told 2 ranks" in process.communicate()[1] and process.returncode == 75
    code, errors = wrapper.run("ends", "1", flags=("--stop-file", str(stop)))
    # the ranks of a start beside a stop file may be told before they have ended by themselves
    assert code in (1, 128 + signal.SIGTERM) and wrapper.starts == 2, "nothing starts again"
    assert "restart" not in errors


def test_ranks_that_a_launcher_leaves_behind_are_ended_and_the_end_counts_as_failed(wrapper: Wrapper) -> None:
    code, errors = wrapper.run("orphans", flags=("--restarts", "0"))
    assert code == 1 and "the launcher ended with 0, and 2 ranks go on without it" in errors
    for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        assert str(wrapper.folder / "rank") not in command_line(pid)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_a_command_that_is_not_there_is_told_by_its_name(tmp_path: Path) -> None:
    command = [sys.executable, str(SUPERVISE), "--", str(tmp_path / "nothing")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and f"can't start {tmp_path / 'nothing'}: No such file" in ended.stderr


def test_a_command_without_ranks_gets_the_signal_itself(wrapper: Wrapper) -> None:
    """One process without a launcher, or a launcher whose ranks are on other machines."""
    alone = wrapper.folder / "launcher"
    alone.write_text(
        '#!/usr/bin/env bash\ntrap "exit 75" TERM\necho >"$FOLDER/ready"\nread -r <"$FOLDER/never"\n'
    )
    process = wrapper.start()
    (wrapper.folder / "ready").read_text()
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 75 and errors.count("the signal goes to the command itself") == 1


def test_what_fails_after_an_hour_each_time_is_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
    assert spec is not None and spec.loader is not None
    supervise = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(supervise)
    monkeypatch.setattr(supervise, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervise, "ranks_below", lambda pid: iter(()))
    assert supervise.Supervisor(["false"], 1, 0.0, None).run() == 1
    errors = capfd.readouterr().err
    assert errors.count("restart 1 of 1") == 10 and "no restart is left of 10 in all" in errors


def test_a_log_that_can_not_be_written_ends_no_supervision(wrapper: Wrapper) -> None:
    command = [sys.executable, str(SUPERVISE), "--pause", "0.01", "--"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*command, str(wrapper.folder / "launcher"), "fails-once"],
            env={**os.environ, "FOLDER": str(wrapper.folder)},
            stderr=full,
            check=False,
        )
    assert (ended.returncode, wrapper.starts) == (0, 2)
