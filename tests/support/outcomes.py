"""Commands that have to go wrong, run one after the other in one process, and what each left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.bad_input import Site, Spoil
from support.launching import REPOSITORY, launch_environment

PREFIX = "dsmixer: error: "
WRONG_INPUT = 2


@dataclass(frozen=True)
class Outcome:
    """A command that went wrong, and what is on disk before and after it."""

    returncode: int
    stdout: str
    stderr: str
    says: list[str]
    before: dict[str, str]
    after: dict[str, str]

    def check(self) -> None:
        """One message, with all that it must say, exit code 2, and not a file changed."""
        assert self.returncode == WRONG_INPUT, self.stderr
        assert self.stderr.count("error:") == 1, self.stderr
        assert "Traceback" not in self.stderr + self.stdout
        missing = [text for text in self.says if text not in self.stderr]
        assert not missing, f"{missing} not in\n{self.stderr}"
        assert self.after == self.before

    def check_alone(self) -> None:
        """Nothing else is on standard error."""
        assert self.stderr.startswith(PREFIX)
        assert "\n  Fix: " in self.stderr


def outcomes_of(root: Path, bases: Path, cases: Mapping[str, Spoil]) -> dict[str, Outcome]:
    """Run all cases, each in a site of its own below ``root``."""
    sites = {name: Site(root / f"{i:02}", bases) for i, name in enumerate(cases)}
    asked = {name: spoil(sites[name]) for name, spoil in cases.items()}
    before = {name: site.tree() for name, site in sites.items()}
    commands, results = root / "commands.json", root / "results.json"
    commands.write_text(json.dumps({name: arguments for name, (arguments, _) in asked.items()}))
    script = REPOSITORY / "tests" / "support" / "run_commands.py"
    done = run([str(script), str(commands), str(results)])
    assert done.returncode == 0, done.stderr
    return {
        name: Outcome(**result, says=asked[name][1], before=before[name], after=sites[name].tree())
        for name, result in json.loads(results.read_text()).items()
    }


def run(arguments: list[str], extra_path: str = "") -> subprocess.CompletedProcess[str]:
    """A Python process as a user starts it, without a launcher; ``extra_path`` goes first of the modules."""
    environment = launch_environment()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if extra_path:
        environment["PYTHONPATH"] = f"{extra_path}:{environment['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def table(outcomes: Mapping[str, Outcome], title: str) -> str:
    """One line a case: its name, exit code and message."""
    rows = [f"\n{len(outcomes)} {title}\n{'case':<44} exit  message"]
    for name, outcome in outcomes.items():
        said = [line for line in outcome.stderr.splitlines() if "error:" in line] or ["(nothing)"]
        rows.append(f"{name:<44} {outcome.returncode:>4}  {said[0].removeprefix(PREFIX)}")
    return "\n".join(rows)
