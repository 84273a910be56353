"""The runs of the parity tests: one launch a world size, started when a test first asks for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from parity.cases import COPIES, LONG, Case, all_cases
from support.comparing import RunRecord, Tensors
from support.launching import Launched, launch
from support.oracles import mixture_of_recipe
from support.tiny import STATE_SPACE, UNEVEN_SIZES, write_recipe

SIDES = ("t5", "flan")
DRIVER = Path(__file__).with_name("driver_runs.py")


class Runs:
    """Runs by name; the whole launch of a run is done when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cases = {case.name: case for case in all_cases()}
        self._recipes = {
            "llama": write_recipe(folder / "llama"),
            **{kind: write_recipe(folder / kind, kind) for kind in ("gpt2", *SIDES, *STATE_SPACE)},
            "llama24": write_recipe(folder / "llama24", copies=COPIES),
            "uneven6": write_recipe(folder / "uneven6", sizes=UNEVEN_SIZES),
            "uneven5": write_recipe(folder / "uneven5", sizes=dict(list(UNEVEN_SIZES.items())[:5])),
        }
        self._launched: dict[tuple[int, str], Launched] = {}

    def __getitem__(self, name: str) -> RunRecord:
        case = self._cases[name]
        key = _launch_of(case)
        if key not in self._launched:
            for other in self._cases.values():
                needed = [other.options.get("take", [None])[0], other.options.get("adapters")]
                for source in filter(None, needed if _launch_of(other) == key else ()):
                    if _launch_of(self._cases[source]) != key:
                        self[source]  # its checkpoints or adapters have to be there
            self._launched[key] = self._launch(key)
        self._launched[key].check()
        return RunRecord(self.folder / case.kind / "runs" / name)

    def output(self, name: str) -> str:
        """What the run has printed."""
        self[name]
        text = self._launched[_launch_of(self._cases[name])].output
        return text.split(f"case {name}\n", 1)[1].split("\ncase ", 1)[0]

    def recipe(self, name: str) -> tuple[Path, tuple[str, ...]]:
        """Recipe and overrides of a run."""
        case = self._cases[name]
        return self._recipes[case.kind], case.overrides

    def kind(self, name: str) -> str:
        """Of the base of a run."""
        return self._cases[name].kind

    def start(self, name: str) -> Tensors:
        """Experts and routers of a run before stage one."""
        mixture = mixture_of_recipe(*self.recipe(name))
        named = [*mixture.expert_parameters(), *mixture.router_parameters()]
        return {key: parameter.detach().clone() for key, parameter in named}

    def _launch(self, key: tuple[int, str]) -> Launched:
        calls = [
            {**asdict(case), **case.options, "recipe": str(self._recipes[case.kind]), "stages": stages}
            for case in self._cases.values()
            if _launch_of(case) == key
            for stages in case.commands
        ]
        path = self.folder / f"cases{key}.json"
        path.write_text(json.dumps(calls))
        return launch(DRIVER, [str(path)], ranks=key[0])


def _launch_of(case: Case) -> tuple[int, str]:
    """Runs with the same key share a launch; those of encoder-decoder and of state-space models, and of
    the long form those of ``test_placement``, have their own."""
    if case.kind in SIDES:
        return case.ranks, "sides"
    if case.kind in STATE_SPACE:
        return case.ranks, "state_space"
    return case.ranks, "placement" if LONG and case.kind.startswith("uneven") else ""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parity"))
