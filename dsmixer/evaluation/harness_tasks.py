"""Tasks of lm-evaluation-harness by name: its own, the ones here, and those of a folder of the user's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partialmethod
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsmixer.config.errors import RunError, UserError
from dsmixer.config.explain import nearest_key
from dsmixer.config.extras import how_to_install
from dsmixer.evaluation.harness_ranks import digest_of, read_alike
from dsmixer.evaluation.sharing import world

OWN_TASKS = Path(__file__).with_name("tasks")
OWN_PREFIX = "dsmixer_"


@dataclass(frozen=True)
class Tasks:
    """Tasks whose records are read.

    Attributes:
        built: tasks and groups as lm-eval takes them.
        manager: lm-eval's index that they come from.
        programs: names of those that run generated programs, and may.
    """

    built: tuple[Any, ...]
    manager: Any
    programs: frozenset[str]

    @property
    def run_code(self) -> bool:
        """Whether some of them run generated programs."""
        return bool(self.programs)


def read_tasks(
    names: Sequence[str],
    *,
    where: str,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    run_generated_code: bool = False,
    code_fix: str = "add --run-generated-code",
) -> Tasks:
    """Find tasks and read their records, which needs no model; in a run a collective of its ranks.

    Args:
        names: of tasks, groups or tags of lm-eval, patterns such as ``mmlu_*``, or ``dsmixer_NAME``.
        where: the place that errors name.
        include_path: a folder of more task files, which go before lm-eval's.
        num_fewshot: solved examples that each prompt will have; None: as the tasks say.
        run_generated_code: whether tasks may run what the model writes.
        code_fix: what to do where they may not, and would.

    Raises:
        UserError: lm-eval is not installed, a name is not known, the records can't be read or are too few, a
            task would run generated programs, or the ranks have other records. On every rank.
    """

    def read() -> Tasks:
        require_lm_eval(where)
        return _read(names, where, include_path, num_fewshot, run_generated_code, code_fix)

    with quietly():
        return read_alike(read, _digest, where)


def _digest(tasks: Tasks) -> str:
    return " ".join(f"{task.task_name}:{digest_of(task.eval_docs)}" for task in _leaves(tasks.built))


def _read(
    names: Sequence[str],
    where: str,
    include_path: Path | None,
    num_fewshot: int | None,
    run_generated_code: bool,
    code_fix: str,
) -> Tasks:
    if include_path is not None and not include_path.is_dir():
        raise UserError("no such folder", where=f"--include-path {include_path}", fix="check the path")
    manager = _manager(names, include_path)
    wanted = [found for name in names for found in _matches(manager, name, where)]
    unsafe = list(dict.fromkeys(name for top in wanted for name in _unsafe(manager, top)))
    _check_code(manager, unsafe, where, run_generated_code, code_fix)
    built = [one for name in dict.fromkeys(wanted) for one in _built(manager, name, where)]
    leaves = list(_leaves(built))
    for task in leaves:
        if getattr(task, "UNSAFE_CODE", False):
            _check_limits(task, unsafe, where)
        _check_fewshot(task, num_fewshot, where)
    programs = frozenset(task.task_name for task in leaves if getattr(task, "UNSAFE_CODE", False))
    return Tasks(tuple(built), manager, programs)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """lm-eval's prints off standard output, its warnings and (but on a terminal) bars away, no fork of it."""
    logger, before, bar = getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC"), tqdm.__init__
    level = logger.level
    logger.setLevel(ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork, amid an engine's threads
    if world()[0] != 0 or not sys.stderr.isatty():
        # what tqdm has for this, TQDM_DISABLE, it reads when it is imported
        tqdm.__init__ = partialmethod(bar, disable=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = bar
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def require_lm_eval(where: str) -> None:
    """Refuse tasks where lm-eval is not installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        problem = "tasks are run by lm-evaluation-harness, which is not installed"
        raise UserError(problem, where=where, fix=how_to_install("eval"))


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's index of task files; without its own thousands of files where they are not needed."""
    from lm_eval.tasks import TaskManager

    folders = [OWN_TASKS, *([include_path] if include_path is not None else [])]
    few = TaskManager(include_path=folders, include_defaults=False)
    here = all(name.startswith(OWN_PREFIX) or name in few.all_tasks for name in names)
    # a group may have members of lm-eval's
    return few if here and not few.all_groups else TaskManager(include_path=folders)


def _matches(manager: Any, name: str, where: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if found:
        return found
    near = nearest_key(name, manager.all_tasks)
    fix = (
        f"write {near}" if near else "lm_eval ls tasks lists lm-eval's own; docs/evaluation.md has those here"
    )
    raise UserError(f"there is no task {name!r}", where=where, fix=fix)


def _unsafe(manager: Any, name: str) -> Iterator[str]:
    """The tasks under a name that run generated programs, by their files alone: none is imported."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    if config.get("unsafe_code"):
        yield name
    listed = config.get("task")
    below: list[Any] = listed if isinstance(listed, list) else []
    members = [one.get("task") or one.get("group") if isinstance(one, dict) else one for one in below]
    tagged = sorted(entry.tags) if entry.yaml_path is None else []
    for member in (*members, *tagged):
        if isinstance(member, str) and member != name:
            yield from _unsafe(manager, member)


def _check_code(manager: Any, unsafe: Sequence[str], where: str, allowed: bool, fix: str) -> None:
    """Generated programs run where that was asked for, and by the runner here, not by lm-eval's."""
    import lm_eval

    its_own = Path(lm_eval.__file__).resolve().parent
    for name in unsafe:
        if its_own in Path(manager.task_index[name].yaml_path).resolve().parents:
            raise UserError(
                f"{name} runs generated programs, and lm-eval's way to do so has none of the limits here",
                where=where,
                fix="take dsmixer_humaneval or dsmixer_mbpp, or run lm_eval itself",
            )
        if not allowed:
            raise UserError(f"{name} runs the programs that the model writes", where=where, fix=fix)


def _check_limits(task: Any, known: Sequence[str], where: str) -> None:
    """A task that runs programs was seen to before it was read, and hands them to the runner here."""
    from dsmixer.evaluation.code_tasks import runs_by_limits

    if task.task_name not in known:
        problem = f"{task.task_name} runs generated programs, and a group or a class hides its file"
        raise UserError(problem, where=where, fix="leave it out, or run lm_eval itself")
    if not runs_by_limits(task.get_config("filter_list")):
        raise UserError(
            f"{task.task_name} runs generated programs in its own way, which has none of the limits here",
            where=where,
            fix="let each filter in its file be a dsmixer.evaluation.code_tasks.Programs "
            "(docs/evaluation.md), or run lm_eval itself",
        )


def _built(manager: Any, name: str, where: str) -> list[Any]:
    """The group, or the tasks, of a name, with their records."""
    try:
        loaded = manager.load([name])
    except (UserError, RunError):
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"the task {name} can't be read: {type(error).__name__}: {text}",
            where=where,
            fix="see whether its data set can be reached from here, and what its file in lm-eval asks for",
        ) from error
    groups = loaded.get("groups") or {}
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _leaves(built: Sequence[Any]) -> Iterator[Any]:
    for one in built:
        yield from one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]


def _check_fewshot(task: Any, num_fewshot: int | None, where: str) -> None:
    """A task with fewer solved examples than its prompts shall have."""
    own = task.get_config("num_fewshot")
    if not num_fewshot or own == 0:
        return
    there = len(list(task.fewshot_docs() or []))
    if there < num_fewshot:
        problem = f"{task.task_name} has {there} solved examples, and each prompt shall have {num_fewshot}"
        raise UserError(problem, where=where, fix="write a smaller --num-fewshot, or give the task more")
