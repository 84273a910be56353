"""The table that decides between compute forms, kept with the run.

Forms round differently. A run that goes on under another version, whose table is a better one, keeps its own,
and goes on with the forms that it began with. So does one that began where the kernels for the CPU could not
be had; one that began with them and finds none says so.
"""

from __future__ import annotations

import json
from pathlib import Path

from dsmixer.checkpoint.atomic import write_json
from dsmixer.config.errors import UserError
from dsmixer.experts.choice import MEASURED, FormTable
from dsmixer.experts.host_library import has_host_library
from dsmixer.model.inject import Mixture
from dsmixer.training.telling import tell_problem
from dsmixer.training.world import World, once


def keep_table(world: World, path: Path, mixture: Mixture) -> None:
    """Give all banks the table of the run, which is written at its first start. A collective.

    Raises:
        UserError: the file is not such a table.
    """
    on_cpu = world.device.type == "cpu"
    measured = MEASURED.without_kernels() if on_cpu and not has_host_library() else MEASURED
    table = once(world, lambda: _read_or_write(path, measured))
    if on_cpu and table.wants_kernels and not has_host_library():
        tell_problem(
            f"{path}: this run began with kernels for the CPU, which can't be had now; it goes on in other "
            "forms, which round differently (`dsmixer doctor` says what is missing)"
        )
    for mixer in mixture.mixers.values():
        mixer.bank.table = table


def _read_or_write(path: Path, measured: FormTable) -> FormTable:
    if not path.exists():
        write_json(path, measured.to_json())
        return measured
    try:
        return FormTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        fix = "remove the file, and the measured table is used"
        raise UserError(f"it is no table of compute forms: {error}", where=str(path), fix=fix) from error
