"""What the commands that use a mixture have in common: finding, loading and placing it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsmixer.config.errors import UserError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The mixture's folder and how its base is loaded."""
    parser.add_argument("folder", type=Path, help="a mixture folder, or the run folder that holds one")
    parser.add_argument(
        "--base-model",
        metavar="PATH_OR_ID",
        help="base model, where it is not the one that the mixture names",
    )
    parser.add_argument(
        "--transfer",
        action="store_true",
        help="let --base-model be another kind of model, with modules of the same names and widths",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the base (default: as in training)"
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4", "fp4"),
        help="4-bit storage of the base (default: as in training)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")


def find_mixture(folder: Path) -> Path:
    """The mixture folder that ``folder`` is or holds.

    Raises:
        UserError: it is neither a mixture nor a run folder with one.
    """
    from dsmixer.adapters.mixture_folder import is_mixture_folder
    from dsmixer.adapters.peft_method import is_saved_by_peft

    for candidate in (folder, folder / "mixture"):
        if is_mixture_folder(candidate) or is_saved_by_peft(candidate):
            return candidate
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), fix="give a mixture folder or a run folder")
    if (folder / "config.yaml").is_file():
        raise UserError("the run has no mixture yet", where=str(folder), fix="let the run finish first")
    raise UserError(
        "neither a mixture nor a run folder with one",
        where=str(folder),
        fix="give runs/NAME or runs/NAME/mixture",
    )


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The mixture that the arguments name, on its device, and its tokenizer.

    Raises:
        UserError: it can't be loaded, or has no tokenizer.
    """
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    import torch

    from dsmixer.adapters.loading import load_mixture

    folder = find_mixture(args.folder)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = f"device {device!r} can't be used: {str(error).splitlines()[0]}"
        raise UserError(problem, where="--device", fix="use cpu, or a device that is there") from error
    model, tokenizer = load_mixture(
        folder,
        base=args.base_model,
        dtype=args.dtype,
        device=device,
        quantization=args.quantization,
        transfer=args.transfer,
    )
    if tokenizer is None:
        fix = "save the mixture with its tokenizer, or give a base model that has one (--base-model)"
        raise UserError("there is no tokenizer in the mixture or beside its base", where=str(folder), fix=fix)
    return model, tokenizer
