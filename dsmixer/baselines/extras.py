"""The libraries of the extra ``baselines``, loaded where a method asks for one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dsmixer.config.errors import UserError
from dsmixer.config.extras import how_to_install


def imported(module: str, method: str) -> Any:
    """A module of an optional library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        problem = f"{method} needs {module.partition('.')[0]}, which can't be imported ({error})"
        raise UserError(problem, fix=how_to_install("baselines")) from error
