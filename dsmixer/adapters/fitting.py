"""Whether adapters fit a base: every weight has its place, and every place that was meant has its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils import constants
from torch import nn

from dsmixer.adapters.lora_config import CONFIG_FILE, is_adalora
from dsmixer.adapters.module_names import base_module_names
from dsmixer.adapters.peft_format import LoraAdapter
from dsmixer.adapters.target_rule import targeted
from dsmixer.adapters.untrusted import printable, shown
from dsmixer.config.errors import UserError
from dsmixer.model.mixed_linear import MixedLinear
from dsmixer.model.targets import is_projection, projection_widths

SHOWN = 3  # module paths named in an error
ADAPTABLE = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What PEFT puts LoRA on besides projections."""


def check_fit(adapters: Mapping[str, LoraAdapter], model: nn.Module, targets: set[str]) -> None:
    """Refuse adapters whose weights and the model's projections do not match one to one.

    Args:
        adapters: by expert name.
        model: the base, with or without mixers.
        targets: the projections that have or get mixers.

    Raises:
        UserError: weights for a module that is not there, is no projection, is not among ``targets`` or has
            other widths; or no weights for a module that the adapter's own configuration targets.
    """
    names = base_module_names(model)
    modules = {name: _unmixed(model.get_submodule(name)) for name in names}
    linear = {name: projection_widths(own) for name, own in modules.items() if is_projection(own)}
    adaptable = [name for name, own in modules.items() if name in linear or isinstance(own, ADAPTABLE)]
    for name, adapter in adapters.items():
        _check_keys(name, adapter, set(names), linear, targets)
        _check_complete(name, adapter, model, adaptable)


def _unmixed(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, MixedLinear) else module


def _check_keys(
    name: str,
    adapter: LoraAdapter,
    names: set[str],
    linear: Mapping[str, tuple[int, int]],
    targets: set[str],
) -> None:
    where = f"{shown(adapter.folder)} (expert {name})"
    for problem, known, fix in (
        ("this base has no module", names, "use the adapter's own base"),
        ("no linear projection is", linear.keys(), "use a LoRA adapter on linear layers"),
        (
            "the mixture has no mixer on",
            targets,
            "add their names to the mixer's targets, so that nothing of the adapter is lost",
        ),
    ):
        unfit = [path for path in adapter.pairs if path not in known]
        if unfit:
            raise UserError(
                f"{problem} {_some(unfit)}, for which the adapter has weights", where=where, fix=fix
            )
    for path, pair in adapter.pairs.items():
        widths = (pair.a_RD.shape[1], pair.b_OR.shape[0])
        if widths != linear[path]:
            raise UserError(
                f"{path}: the adapter maps {widths[0]} to {widths[1]}, the base {linear[path][0]} to "
                f"{linear[path][1]}",
                where=where,
                fix="use the base model that the adapter was trained on",
            )


def _check_complete(name: str, adapter: LoraAdapter, model: nn.Module, adaptable: Sequence[str]) -> None:
    """PEFT would start the missing ones anew and say nothing; a file that lost a part must not pass."""
    targets = _target_modules(adapter.config, model, adaptable)
    if targets is None:
        return
    where = f"{shown(adapter.folder / CONFIG_FILE)}"
    known = list(dict.fromkeys([*adaptable, *adapter.pairs]))
    meant = set(targeted(adapter.config, targets, known, where))
    missing = [path for path in adaptable if path in meant and path not in adapter.pairs]
    if missing:
        raise UserError(
            f"there are no weights for {_some(missing)}, which target_modules names (expert {name})",
            where=f"{where}: target_modules",
            fix="copy the whole adapter again",
        )
    extra = [path for path in adapter.pairs if path not in meant]
    if extra:
        raise UserError(
            f"there are weights for {_some(extra)}, which target_modules leaves out (expert {name})",
            where=f"{where}: target_modules",
            fix="bring the weights and the configuration of one adapter together",
        )


def _target_modules(config: Mapping[str, Any], model: nn.Module, adaptable: Sequence[str]) -> Any:
    """The configuration's ``target_modules`` as PEFT reads them; None where nothing says what was meant."""
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == constants.INCLUDE_LINEAR_LAYERS_SHORTHAND:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        modules = dict(model.named_modules())
        return [
            path
            for path in adaptable
            if modules[path] is not output and is_projection(_unmixed(modules[path]))
        ]
    if targets:
        return targets
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    return (
        constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
        if is_adalora(config)
        else constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ).get(kind)


def _some(paths: Sequence[str]) -> str:
    some = ", ".join(printable(path, 120) for path in paths[:SHOWN])
    return some if len(paths) <= SHOWN else f"{some} and {len(paths) - SHOWN} more"
