"""Settings that do not go together end with one message and exit code 2, before weights are read.

``pytest -s`` prints the table of combinations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bad_combinations import COMBINATIONS, write_bases
from support.bad_input import Site
from support.launching import REPOSITORY
from support.outcomes import PREFIX, WRONG_INPUT, Outcome, outcomes_of, run, table


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Iterator[dict[str, Outcome]]:
    """All combinations, run one after the other in one process."""
    found = outcomes_of(tmp_path_factory.mktemp("wrong"), bases, COMBINATIONS)
    yield found
    print(table(found, "wrong combinations"))


@pytest.mark.parametrize("name", list(COMBINATIONS))
def test_a_wrong_combination_is_refused_with_its_reason_and_a_way_out(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    outcomes[name].check()
    outcomes[name].check_alone()


def test_without_the_wrong_setting_the_same_site_gets_as_far_as_the_missing_weights(
    tmp_path: Path, bases: Path
) -> None:
    """So the messages above came before; and a plan that does not fit may be tried all the same."""
    site = Site(tmp_path / "site", bases)
    wanted = ("base.quantization=nf4", "placement.device_memory_gb=0.0001", "placement.check_memory=false")
    done = run([str(REPOSITORY / "launch" / "train.py"), *site.train(*wanted)[1:]])
    assert done.returncode == WRONG_INPUT, done.stderr
    assert "the model could not be loaded" in done.stderr and "model.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libbitsandbytes.so: no such file')", "libbitsandbytes.so: no such file"),
        ("functional = None", "bitsandbytes.functional"),
    ],
    ids=["broken", "another package of that name"],
)
def test_a_broken_bitsandbytes_is_told_before_the_base_is_loaded(
    tmp_path: Path, bases: Path, source: str, reason: str
) -> None:
    site = Site(tmp_path / "site", bases)
    broken = tmp_path / "broken" / "bitsandbytes" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text(source)
    command = [str(REPOSITORY / "launch" / "train.py"), *site.train("base.quantization=nf4")[1:]]
    done = run(command, extra_path=str(broken.parent.parent))
    assert done.returncode == WRONG_INPUT, done.stderr
    assert done.stderr.startswith(f"{PREFIX}command line: base.quantization=nf4") and reason in done.stderr
    assert "reinstall it" in done.stderr and "base.quantization: none" in done.stderr
