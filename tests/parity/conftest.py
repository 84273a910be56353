"""The runs of the parity tests: one launch a world size, started when a test first asks for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from parity.cases import COPIES, all_cases
from support.comparing import RunRecord, Tensors
from support.launching import Launched, launch
from support.oracles import mixture_of_recipe
from support.tiny import write_recipe

DRIVER = Path(__file__).with_name("driver_runs.py")


class Runs:
    """Runs by name; the whole launch of a run is done when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cases = {case.name: case for case in all_cases()}
        self._recipes = {
            "llama": write_recipe(folder / "llama"),
            "gpt2": write_recipe(folder / "gpt2", "gpt2"),
            "llama24": write_recipe(folder / "llama24", copies=COPIES),
        }
        self._launched: dict[int, Launched] = {}

    def __getitem__(self, name: str) -> RunRecord:
        case = self._cases[name]
        if case.ranks not in self._launched:
            self._launched[case.ranks] = self._launch(case.ranks)
        self._launched[case.ranks].check()
        return RunRecord(self.folder / case.kind / "runs" / name)

    def recipe(self, name: str) -> tuple[Path, tuple[str, ...]]:
        """Recipe and overrides of a run."""
        case = self._cases[name]
        return self._recipes[case.kind], case.overrides

    def start(self, name: str) -> Tensors:
        """Experts and routers of a run before stage one."""
        mixture = mixture_of_recipe(*self.recipe(name))
        named = [*mixture.expert_parameters(), *mixture.router_parameters()]
        return {key: parameter.detach().clone() for key, parameter in named}

    def _launch(self, ranks: int) -> Launched:
        calls = [
            {**asdict(case), **case.options, "recipe": str(self._recipes[case.kind]), "stages": stages}
            for case in self._cases.values()
            if case.ranks == ranks
            for stages in case.commands
        ]
        path = self.folder / f"cases{ranks}.json"
        path.write_text(json.dumps(calls))
        return launch(DRIVER, [str(path)], ranks=ranks)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parity"))
