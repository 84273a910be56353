"""The runs of the tests of faults, and the table that they print at the end (``pytest -s``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fault_runs import Runs
from support.forked import RankServer

SECRET_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRET = "hf_" + "Zq7" * 11


@pytest.fixture(scope="session")
def secret() -> str:
    """What the environment of the ranks holds."""
    return SECRET


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRET_VARIABLES:
            patch.setenv(name, SECRET)
        with RankServer(folder) as server:
            found = Runs(folder, server)
            yield found
    print(f"\n\n{found.table()}")
