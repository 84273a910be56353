"""What a recipe takes on this machine: ``planned.py RECIPE RANKS MEMORY MODEL_CONFIG OVERRIDE …``, as JSON.

The same plan as ``dsmixer plan`` makes, in a process of its own: it imports torch and transformers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from dsmixer.config.checks import check_routing
from dsmixer.config.ds_json import merge_ds_config
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import expert_names, load_recipe
from dsmixer.model.load import bare_base
from dsmixer.model.shape import model_shape
from dsmixer.placement.memory import router_weights
from dsmixer.placement.plan import make_plan
from dsmixer.placement.request import Cluster
from dsmixer.training.planning import PoolFacts, plan_request

STATE_BYTES = 12
"""Of a number that trains in a checkpoint: itself and two moments."""

ORIGIN_BYTES = 4
"""Its value after stage one, where stage two holds experts near it."""


def main(path: str, ranks: int, memory: int, model: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Plan; facts for ``recipe.check_plan``.

    Args:
        path: of the recipe.
        ranks: on this machine.
        memory: bytes of a rank's device.
        model: a folder in place of ``base.model``; empty: none.
        overrides: as on the command line.

    Raises:
        UserError: the base's configuration can't be read, or the recipe does not go with it.
    """
    loaded, _ = merge_ds_config(load_recipe(path, overrides))
    recipe = loaded.recipe
    names = expert_names(recipe)
    if names is None:
        fix = "dsmixer plan --experts E plans a pool of E experts"
        raise UserError("a column of the data names the domains, and no data is read here", fix=fix)
    if recipe.stage2.enabled:
        check_routing(loaded, names)
    base = recipe.base.model_copy(update={"model": model, "revision": None}) if model else recipe.base
    shape = model_shape(bare_base(base, packing=recipe.data.packing), recipe.mixer.targets)
    if recipe.placement.device_memory_gb is not None:
        memory = int(recipe.placement.device_memory_gb * 2**30)
    request = plan_request(loaded, shape, PoolFacts(names), Cluster(ranks, ranks, memory))
    plan = make_plan(request)
    trained = sum(request.pool.ranks) * shape.width + router_weights(request)
    origin = ORIGIN_BYTES if any(stage.keeps_origin for stage in request.stages) else 0
    # the ones that are kept of each stage and the one being written; then the mixture itself
    kept = (recipe.checkpoint.keep + 1) * len(request.stages)
    return {
        "plan": plan.to_dict(),
        "run_bytes": trained * ((STATE_BYTES + origin) * kept + ORIGIN_BYTES),
        "base_bytes": 2 * shape.num_weights,
    }


if __name__ == "__main__":
    try:
        told = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
    except UserError as error:
        told = {"refused": error.problem, "where": error.where, "fix": error.fix}
    print(json.dumps(told))
