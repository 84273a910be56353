"""From the tensors of an adapter to one pair of factors a projection, in each form that PEFT has saved.

    LoRA       ``lora_A [R, D]``, ``lora_B [O, R]``                   s B A x
    AdaLoRA    the same with ``lora_E [R, 1]``                        s B diag(E) A x
    merged     ``lora_A [n R, D]``, ``lora_B [O', R, 1]``, grouped    s P B' A x

The merged form is PEFT's first (0.1 and 0.2), for projections that are fused of several: ``lora_B`` is a
convolution of width one in groups, one a part that was enabled, and ``P`` puts its outputs into those parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsmixer.adapters.lora_config import is_adalora
from dsmixer.adapters.memory import check_memory
from dsmixer.adapters.target_rule import pattern_values
from dsmixer.adapters.untrusted import SAVE_AGAIN, printable
from dsmixer.config.errors import UserError
from dsmixer.experts.bank import lora_scaling

KEY_PREFIX = "base_model.model."
MAX_PATH = 500
PATH = re.compile(r"[\w-]+(\.[\w-]+)*")
ADALORA_SHIFT = 1e-5
"""What AdaLoRA adds to the rank that it divides by."""

Tensors = Mapping[str, torch.Tensor]
BOTH = "bring the weights and the configuration of one adapter together"
WITHOUT_BASE = (
    "if it is the base's own, save it again in PEFT with save_pretrained(FOLDER, "
    "save_embedding_layers=False); if it was trained, train it again without"
)


@dataclass(frozen=True)
class LoraPair:
    """One expert on one projection.

    Attributes:
        a_RD: PEFT's ``lora_A`` weight, float32.
        b_OR: PEFT's ``lora_B`` weight, float32.
        scaling: ``s``, what ``B A x`` is multiplied with.
    """

    a_RD: torch.Tensor
    b_OR: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """R; 0 where AdaLoRA kept nothing."""
        return self.a_RD.shape[0]


def pairs_of(
    config: Mapping[str, Any], tensors: Tensors, config_at: str, weights_at: str
) -> dict[str, LoraPair]:
    """One pair a projection that the adapter has weights for.

    Args:
        config: its configuration, checked.
        tensors: its weights.
        config_at: the file of the configuration, for messages.
        weights_at: the file of the weights, for messages.

    Raises:
        UserError: weights of another kind, half a pair, or shapes that the configuration denies.
    """
    by_path = _by_projection(tensors, weights_at)
    if not by_path:
        raise UserError("the file holds no weights", where=weights_at, fix=SAVE_AGAIN)
    form = _adalora if is_adalora(config) else _merged if config.get("enable_lora") else _lora
    return form(config, by_path, config_at, weights_at)


def _by_projection(tensors: Tensors, where: str) -> dict[str, dict[str, torch.Tensor]]:
    """The parts ``A``, ``B`` and ``E`` of each projection.

    Keys come with and without ``base_model.model.``, which PEFT's wrapper adds, and with and without the name
    that the adapter had where it was trained.
    """
    prefixed = {key.startswith(KEY_PREFIX) for key in tensors}
    names: set[str] = set()
    found: dict[str, dict[str, torch.Tensor]] = {}
    # what is no factor at all is looked at last: what the factors are says more
    for key, tensor in sorted(tensors.items(), key=lambda item: ".lora_" not in item[0]):
        path, part, name = _split_key(key, tensor, where)
        if part is None:
            continue
        if name is not None:
            names.add(name)
        parts = found.setdefault(path, {})
        if len(prefixed) > 1 or len(names) > 1 or part in parts:
            problem = f"the file mixes keys of several adapters or forms, as {printable(key)}"
            raise UserError(problem, where=where, fix="save one adapter alone, with PEFT's save_pretrained")
        parts[part] = tensor
    return found


def _split_key(key: str, tensor: torch.Tensor, where: str) -> tuple[str, str | None, str | None]:
    """Path, part and adapter's name of a key; no part for a bias of ``lora_B`` that is zero."""
    path, _, rest = key.removeprefix(KEY_PREFIX).rpartition(".lora_")
    part, *tail = rest.split(".")
    kind = tail.pop() if tail and tail[-1] in ("weight", "bias") else None
    if len(path) > MAX_PATH or part not in ("A", "B", "E") or len(tail) > 1 or not PATH.fullmatch(path):
        _refuse_key(key, where)
    if kind == "bias":
        if part != "B" or tensor.any():
            problem = f"{printable(key)} adds a constant, which is no sum of low rank"
            raise UserError(problem, where=where, fix="train it again without lora_bias")
        return path, None, None
    return path, part, tail[0] if tail else None


def _refuse_key(key: str, where: str) -> None:
    """Say why a key is no factor of a projection."""
    name, whole = printable(key), f"{printable(key)} is a whole weight of the base, not a factor of low rank"
    problem, fix = f"{name} is no lora_A or lora_B of a projection", "use a LoRA adapter on linear layers"
    if ".lora_embedding_" in key:
        problem = (
            f"{name} is LoRA on an embedding, which looks tokens up and has no input that a router could see"
        )
        fix = "train it again without the embedding in target_modules, or merge it into its base and use that"
    elif ".lora_magnitude_vector" in key:
        problem = f"{name} is of DoRA, which rescales the base's own weights"
        fix = "train plain LoRA, or merge it into its base and use that"
    elif key.endswith(".bias") and ".lora_" not in key:
        problem = f"{name} is a trained bias, which takes the place of the base's"
        fix = "train it again with bias: none, or merge it into its base and use that"
    elif key.endswith(".weight") and ".lora_" not in key:
        problem, fix = whole, WITHOUT_BASE
    raise UserError(problem, where=where, fix=fix)


def _factors(path: str, found: Tensors, parts: Sequence[str], where: str) -> list[torch.Tensor]:
    for part in parts:
        if part not in found:
            raise UserError(f"{printable(path)} has no lora_{part}", where=where, fix=SAVE_AGAIN)
    if len(found) > len(parts):
        problem = f"{printable(path)} has lora_{max(found)}, which is of AdaLoRA"
        raise UserError(problem, where=where, fix=BOTH)
    return [found[part] for part in parts]


def _refuse_shapes(path: str, factors: Sequence[torch.Tensor], expected: str, where: str) -> None:
    shapes = " and ".join(
        f"lora_{part} {printable(list(factor.shape), 60)}"
        for part, factor in zip("ABE", factors, strict=False)
    )
    raise UserError(f"{printable(path)}: {shapes} are not {expected}", where=where, fix=BOTH)


def _lora(
    config: Mapping[str, Any], by_path: Mapping[str, Tensors], config_at: str, where: str
) -> dict[str, LoraPair]:
    paths = list(by_path)
    ranks = pattern_values(config.get("rank_pattern") or {}, config["r"], paths, f"{config_at}: rank_pattern")
    alphas = pattern_values(
        config.get("alpha_pattern") or {}, config["lora_alpha"], paths, f"{config_at}: alpha_pattern"
    )
    pairs = {}
    for path, found in by_path.items():
        a_RD, b_OR = _factors(path, found, "AB", where)
        rank = ranks[path]
        if a_RD.dim() == b_OR.dim() > 2:
            problem = (
                f"{printable(path)} is a convolution: its LoRA slides over positions and is no projection"
            )
            fix = "train it again without the convolution in target_modules, or merge it into its base"
            raise UserError(problem, where=where, fix=fix)
        if not _fit(a_RD, b_OR) or a_RD.shape[0] != rank:
            _refuse_shapes(path, (a_RD, b_OR), f"of rank {rank}, which {config_at} gives", where)
        pairs[path] = LoraPair(a_RD, b_OR, lora_scaling(rank, alphas[path], bool(config.get("use_rslora"))))
    return pairs


def _fit(a_RD: torch.Tensor, b_OR: torch.Tensor) -> bool:
    """Whether two factors have a product, and one that is not empty."""
    return (
        a_RD.dim() == b_OR.dim() == 2
        and a_RD.shape[0] == b_OR.shape[1]
        and a_RD.shape[1] > 0
        and b_OR.shape[0] > 0
    )


def _adalora(
    config: Mapping[str, Any], by_path: Mapping[str, Tensors], config_at: str, where: str
) -> dict[str, LoraPair]:
    """``s = alpha / (R0 + 1e-5)`` with R0 the rank at the start; a projection may have kept none."""
    kept = _kept_ranks(config, f"{config_at}: rank_pattern")
    scaling = config["lora_alpha"] / (config["init_r"] + ADALORA_SHIFT)
    pairs = {}
    for path, found in by_path.items():
        a_RD, b_OR, e_R1 = _factors(path, found, "ABE", where)
        rank = kept.pop(path, config["init_r"])
        if not _fit(a_RD, b_OR) or a_RD.shape[0] != rank or e_R1.shape != (rank, 1):
            expected = f"of rank {rank}, which {config_at} gives"
            _refuse_shapes(path, (a_RD, b_OR, e_R1), expected, where)
        pairs[path] = LoraPair(a_RD * e_R1, b_OR, scaling)
    if kept:
        lost = printable(next(iter(kept)))
        raise UserError(f"the file has no weights for {lost}", where=where, fix=SAVE_AGAIN)
    if not any(pair.rank for pair in pairs.values()):
        raise UserError(
            "no projection kept any rank", where=where, fix="train it again with a higher target_r"
        )
    return pairs


def _kept_ranks(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Ranks by path; AdaLoRA notes for each which of the first ones it kept."""
    ranks = {}
    for key, kept in (config.get("rank_pattern") or {}).items():
        path = key.removeprefix(KEY_PREFIX).rpartition(".lora_E")[0]
        mask = isinstance(kept, list) and all(type(one) is bool for one in kept)
        if not path or not mask or len(kept) != config["init_r"]:
            problem = f"{printable(key)}: expected {config['init_r']} times true or false"
            raise UserError(problem, where=where, fix=SAVE_AGAIN)
        ranks[path] = sum(kept)
    return ranks


def _merged(
    config: Mapping[str, Any], by_path: Mapping[str, Tensors], config_at: str, where: str
) -> dict[str, LoraPair]:
    enabled: list[bool] = config["enable_lora"]
    rows = config["r"] * sum(enabled)
    scaling = lora_scaling(config["r"], config["lora_alpha"], rslora=False)
    outputs = sum(found["B"].shape[0] for found in by_path.values() if "B" in found and found["B"].dim())
    # as float32, the enabled parts alone and then among the zeros of the others
    check_memory(4 * rows * (outputs + outputs * len(enabled) // max(1, sum(enabled))), where)
    pairs = {}
    for path, found in by_path.items():
        a_RD, b_grouped = _factors(path, found, "AB", where)
        b_OR = _ungrouped(b_grouped, rows, enabled) if a_RD.shape[:1] == (rows,) else None
        if a_RD.dim() != 2 or not math.prod(a_RD.shape) or b_OR is None:
            expected = f"the factors of {sum(enabled)} parts of rank {config['r']}, which {config_at} gives"
            _refuse_shapes(path, (a_RD, b_grouped), expected, where)
        assert b_OR is not None
        pairs[path] = LoraPair(a_RD, b_OR, scaling)
    return pairs


def _ungrouped(b_grouped: torch.Tensor, rows: int, enabled: Sequence[bool]) -> torch.Tensor | None:
    """The convolution ``[O / len * n, rows / groups, 1]`` in groups as one matrix ``[O, rows]``.

    The parts of O are contiguous, whatever the base thinks they are: BLOOM lays q, k and v out head by head,
    and what was trained as the first and last third is neither its q nor its v.

    Returns:
        None if the shape is not that of a grouped convolution over these parts.
    """
    num = sum(enabled)
    if b_grouped.dim() != 3 or b_grouped.shape[2] != 1 or not math.prod(b_grouped.shape):
        return None
    outputs, width = b_grouped.shape[0], b_grouped.shape[1]
    groups = rows // width
    # PEFT had two groups and loralib one a part: more would only be larger than the file
    if rows % width or groups > max(2, num) or outputs % groups or outputs % num:
        return None
    blocks = b_grouped[:, :, 0].reshape(groups, outputs // groups, width)
    stacked = torch.block_diag(*blocks)
    part = outputs // num
    b_OR = stacked.new_zeros(len(enabled), part, rows)
    b_OR[torch.tensor(enabled)] = stacked.reshape(num, part, rows)
    return b_OR.reshape(len(enabled) * part, rows)
