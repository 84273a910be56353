"""A mixture with its weights frozen: one plain PEFT adapter that a server of adapters can serve.

    W0 x + Σ_e w̄_e s_e B_e A_e x  =  W0 x + [w̄_1 s_1 B_1 | w̄_2 s_2 B_2 | …] [A_1; A_2; …] x

Its rank is the sum of the experts' ranks, its scale 1. Routing by the token is what is lost.

Shapes: M routers, E experts, R rank, D input width, O output width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsmixer.adapters.card import front_matter, plain_table
from dsmixer.adapters.mixture_folder import CARD_FILE, stored_transposed, task_type
from dsmixer.adapters.module_names import base_module_names, shortest_names
from dsmixer.adapters.outside_peft import check_applied_by_peft
from dsmixer.adapters.peft_format import write_adapter
from dsmixer.adapters.publish import published
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture

FACTS_FILE = "static_merge.json"
SERVED_RANK = 512
"""The largest rank that vLLM serves."""

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


def pruned(weights_ME: torch.Tensor, min_weight: float) -> torch.Tensor:
    """The weights without the experts whose mean over routers is below ``min_weight``; the others' stay."""
    kept_E = weights_ME.mean(0) >= min_weight
    return weights_ME * kept_E


def model_type(mixture: Mixture) -> str | None:
    """transformers' name of the kind of model that a mixture is on."""
    found: str | None = getattr(getattr(mixture.model, "config", None), "model_type", None)
    return found


def carrying(mixture: Mixture) -> list[str]:
    """The projections where some expert has an output."""
    return [path for path, mixer in mixture.mixers.items() if bool(mixer.bank.lora_B.any())]


def kept_experts(mixture: Mixture, weights_ME: torch.Tensor) -> list[str]:
    """The experts that some router gives a weight."""
    heard_E = (weights_ME > 0).any(0).tolist()
    return [name for name, heard in zip(mixture.expert_names, heard_E, strict=True) if heard]


@torch.no_grad()
def static_matrices(mixture: Mixture, weights_ME: torch.Tensor) -> Matrices:
    """``lora_A [R, D]`` and ``lora_B [O, R]`` of the merge by module path; R is the same everywhere.

    Args:
        mixture: all of its experts are here.
        weights_ME: of each expert at each router, in the order of ``mixture.routers``.

    Raises:
        UserError: no expert has a weight.
    """
    experts = [mixture.expert_names.index(name) for name in kept_experts(mixture, weights_ME)]
    if not experts:
        raise UserError("no expert is left", where="--min-weight", fix="give a smaller weight")
    matrices: Matrices = {}
    for path, mixer in mixture.mixers.items():
        bank, weights_E = mixer.bank, weights_ME[mixer.router_index].tolist()
        a_RD = torch.cat([bank.lora_A[e, : bank.ranks[e]] for e in experts])
        b_RO = torch.cat(
            [bank.lora_B[e, : bank.ranks[e]] * (weights_E[e] * bank.scaling[e]) for e in experts]
        )
        if a_RD.any() or b_RO.any():
            matrices[path] = (a_RD, b_RO.T)
    return matrices


def write_static(
    mixture: Mixture,
    weights_ME: torch.Tensor,
    folder: Path,
    *,
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> int:
    """Write the merge as a PEFT LoRA folder with a card; its rank.

    Args:
        folder: appears whole or not at all; must not be there, or be empty.
        about: ``base`` of the mixture's description.
        facts: what was measured: ``task``, ``mixture``, ``weights`` and ``losses``, see ``card_text``.

    Raises:
        UserError: something is in the folder already, the disk refuses, nothing would be merged, or PEFT
            could not apply it.
    """
    matrices = static_matrices(mixture, weights_ME)
    rank = next(iter(matrices.values()))[0].shape[0]
    check_applied_by_peft(model_type(mixture), matrices, str(folder))
    base = about.get("model")
    with published(folder, may_replace=lambda _: False) as part:
        inner = part / "adapter"
        write_adapter(
            inner,
            matrices,
            rank=rank,
            alpha=rank,
            targets=shortest_names(matrices.keys(), base_module_names(mixture.model)),
            fan_in_fan_out=all(stored_transposed(mixture.mixers[path].base) for path in matrices),
            base=base,
            revision=about.get("revision"),
            task_type=task_type(mixture.model),
        )
        for file in inner.iterdir():
            file.rename(part / file.name)
        inner.rmdir()
        text = json.dumps({**facts, "rank": rank}, indent=2) + "\n"
        (part / FACTS_FILE).write_text(text, encoding="utf-8")
        (part / CARD_FILE).write_text(card_text({**facts, "rank": rank, "base": base}), encoding="utf-8")
    return rank


def card_text(facts: Mapping[str, Any]) -> str:
    """The card of a static merge.

    Args:
        facts: ``base``; ``task``: what the weights were measured on; ``num_weighed`` and ``num_held_out``
            examples; ``rank``; ``weights``: mean over routers by expert; ``losses``: by method, nats a target
            token; ``differences``: of the logits, by merge; ``license``.
    """
    losses, differences = facts["losses"], facts["differences"]
    rows = [
        [name, f"{value:.4f}", f"{value - losses['mixture']:+.4f}", _percent(differences.get(name))]
        for name, value in losses.items()
    ]
    weights = [[name, f"{value:.4f}"] for name, value in facts["weights"].items()]
    limits = (
        f"The weights are those of `{facts['task']}` and the same for every token: what the routers would "
        "choose on another task is lost, and nothing was measured there. "
        f"Rank {facts['rank']}{rank_note(facts['rank'])}."
    )
    return "\n".join(
        [
            front_matter(facts, tags=("peft", "lora", "dsmixer")),
            "# A static merge of a mixture of LoRA experts\n",
            f"One plain PEFT LoRA adapter for `{facts.get('base') or '?'}`: each expert of the mixture with "
            f"the mean weight that its routers gave it on {facts['num_weighed']} examples of "
            f"`{facts['task']}`. Made with dsmixer.\n",
            "## What it costs\n\n"
            f"Held-out loss on {facts['num_held_out']} other examples, nats a target token, and the mean "
            "difference of the logits from the routed mixture's.\n\n"
            + plain_table(["method", "loss", "above the routed mixture", "difference of logits"], rows),
            "## Weights\n\n" + plain_table(["expert", "mean weight over routers"], weights),
            "## Limits\n\n" + limits + "\n",
        ]
    )


def rank_note(rank: int) -> str:
    """What servers say to a rank."""
    if rank > SERVED_RANK:
        return f" is above {SERVED_RANK}, the largest that vLLM serves: leave out experts (--min-weight)"
    return f": a server has to allow it (vLLM: --max-lora-rank, at most {SERVED_RANK})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
