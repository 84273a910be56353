"""What is in a mixture folder, as plain values for a reader or a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsmixer.adapters.peft_format import read_adapter
from dsmixer.adapters.pool_draft import Draft, open_draft


def pool_facts(folder: str | Path) -> dict[str, Any]:
    """Base, mixers, routing, experts and changes of a mixture.

    Returns:
        Of each expert ``name``, ``rank``, ``alpha``, ``num_projections`` and ``num_weights`` of its adapter,
        and ``row_distance``: the distance of its rows of the routers from the mean of all experts' rows, mean
        over the routers. An expert whose rows are not trained has next to none.

    Raises:
        UserError: it is no mixture, or an expert in it can't be read.
    """
    draft = open_draft(folder)
    config, routing = draft.config, draft.config.default_routing()
    distances = _row_distances(draft)
    experts = []
    for index, name in enumerate(config.experts):
        pairs = read_adapter(draft.experts[name]).pairs.values()
        experts.append(
            {
                "name": name,
                "rank": config.rank_list[index],
                "alpha": config.alpha_list[index],
                "num_projections": len(pairs),
                "num_weights": sum(pair.a_RD.numel() + pair.b_OR.numel() for pair in pairs),
                "row_distance": distances[index],
            }
        )
    return {
        "folder": str(folder),
        "base": dict(draft.about),
        "targets": list(config.targets),
        "router": config.router,
        "num_routers": len(draft.routers),
        "routing": routing.mode,
        "top_k": routing.top_k,
        "history": list(draft.history),
        "experts": experts,
    }


def _row_distances(draft: Draft) -> list[float]:
    norms = [(weight_ED - weight_ED.mean(0)).norm(dim=1) for weight_ED in draft.routers.values()]
    return [float(sum(norm[e] for norm in norms)) / max(1, len(norms)) for e in range(len(draft.experts))]
