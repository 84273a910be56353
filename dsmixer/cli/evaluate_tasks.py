"""``dsmixer evaluate --tasks``: tasks of lm-evaluation-harness on a mixture, its base or a plain model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dsmixer.cli.loading import find_mixture, load
from dsmixer.config.errors import UserError

METHODS = ("mixture", "base")
"""Who answers, if nothing says."""


def evaluate_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Read the tasks, then the model, and run them.

    Returns:
        see ``score_tasks``; with ``generated_code`` where programs were run: their limits, and whether they
        were kept from the network and from starting processes.

    Raises:
        UserError: a task, its records, a method or the model can't be used.
    """
    from dsmixer.evaluation.harness import has_mixers, score_tasks
    from dsmixer.evaluation.methods import BATCH_SIZE

    plain = is_plain_model(args.folder)
    methods, tasks = _methods(args, plain), _read(args)
    code = _code_facts() if tasks.run_code else {}
    model, tokenizer = _load_plain(args) if plain else load(args)
    if has_mixers(model):
        _check_experts(methods, model.dsmixer.mixture.expert_names)
    result = score_tasks(
        model,
        tokenizer,
        tasks,
        methods,
        batch_size=args.batch_size or BATCH_SIZE,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    return {**result, **code}


def is_plain_model(folder: Path) -> bool:
    """Whether a folder holds a transformers model and no mixture."""
    try:
        find_mixture(folder)
    except UserError:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and "model_type" in config
    return False


def _methods(args: argparse.Namespace, plain: bool) -> list[str]:
    asked = list(dict.fromkeys(args.answered_as or (METHODS[1:] if plain else METHODS)))
    for name in asked:
        if plain and name != "base":
            problem = f"{name} answers in a mixture, and this is a plain model"
            raise UserError(problem, where="--as", fix="write --as base, or leave it out")
        if name not in ("base", "uniform", "mixture") and not name.startswith("expert:"):
            fix = "write mixture, base, uniform or expert:NAME"
            raise UserError(f"nothing answers as {name!r}", where="--as", fix=fix)
    return asked


def _read(args: argparse.Namespace) -> Any:
    from dsmixer.evaluation.harness_tasks import read_tasks

    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"{args.num_fewshot} solved examples", where="--num-fewshot", fix="write 0 or more")
    return read_tasks(
        args.tasks,
        where="--tasks",
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        run_generated_code=args.run_generated_code,
    )


def _load_plain(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model of a folder without a mixture, in the type that it is stored in."""
    import torch

    from dsmixer.config.schema import BaseConfig
    from dsmixer.model.load import DTYPES, load_base, read_config
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    if args.base_model is not None or args.transfer:
        problem = "this is a plain model, which has no base"
        raise UserError(problem, where=str(args.folder), fix="leave --base-model and --transfer out")
    base = BaseConfig(model=str(args.folder), quantization=args.quantization or "none")
    stored = {dtype: name for name, dtype in DTYPES.items()}.get(read_config(base).dtype, "bfloat16")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_base(base.model_copy(update={"dtype": args.dtype or stored}), device=device)
    return loaded.model.eval(), loaded.tokenizer


def _check_experts(methods: list[str], names: list[str]) -> None:
    from dsmixer.config.explain import nearest_key

    for method in methods:
        name = method.removeprefix("expert:")
        if method.startswith("expert:") and name not in names:
            fix = f"write expert:{nearest_key(name, names) or names[0]}"
            raise UserError(f"no expert is called {name!r}", where="--as", fix=fix)


def _code_facts() -> dict[str, Any]:
    """What holds for generated programs on this machine; told where it is less than it could be."""
    from dataclasses import asdict

    from dsmixer.evaluation.code_run import Limits, run_program

    tried = run_program("pass")
    reached = {
        "network": not tried.network_isolated,
        "new processes": not tried.processes_forbidden,
    }
    for what, open_ in reached.items():
        if open_:
            print(f"generated programs are not kept from: {what}", file=sys.stderr)
    isolation = {
        "network_isolated": tried.network_isolated,
        "processes_forbidden": tried.processes_forbidden,
    }
    return {"generated_code": {**asdict(Limits()), **isolation}}
