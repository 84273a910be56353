"""The other methods of a comparison: their names and settings, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsmixer.compare.plan import Plan
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import expert_names

if TYPE_CHECKING:
    from dsmixer.baselines.stage_one import BeforeStageTwo

STAGE_ONE = "@stage1"


def check_methods(plan: Plan) -> None:
    """Refuse methods that there are none of, and settings that they do not have.

    Raises:
        UserError: names the place.
    """
    comparison = plan.loaded.comparison
    if not comparison.methods:
        return
    from dsmixer.training.progress import quiet_libraries

    quiet_libraries()
    from dsmixer.baselines.named import Names  # with them come the libraries that take seconds to import
    from dsmixer.baselines.settings import configured

    def nowhere() -> BeforeStageTwo:
        raise AssertionError("no name that is asked here wants them")

    chosen: dict[str, Any] = {}
    trained = any(whole.loaded.recipe.stage1.enabled for whole in plan.whole)
    for index, name in enumerate(comparison.methods):
        try:
            if name == "mixture" and trained:
                problem = "the mixture that methods are scored on has routers that have not trained yet"
                raise UserError(problem, fix="leave it out: the variants are the mixtures")
            for whole in plan.whole:
                experts = expert_names(whole.loaded.recipe)
                if experts is None and name.startswith("expert:"):  # only the data knows them
                    continue
                chosen |= Names(experts or [], nowhere).chosen([name.removesuffix(STAGE_ONE)])
        except UserError as error:
            where = plan.loaded.where(f"comparison.methods.{index}")
            raise UserError(error.problem, where=where, fix=error.fix) from error
    configured(chosen, comparison.method_settings, plan.loaded.where("comparison.method_settings"))
