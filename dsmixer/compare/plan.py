"""What a comparison has to run: its cells, in the order in which they can be run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsmixer.compare.recipes import (
    VariantRecipe,
    experts_raw,
    recipe_digest,
    routers_raw,
    told_of,
    trunk_digest,
    variant_recipe,
    whole_raw,
)
from dsmixer.compare.variants import Variant, safe_name, variants_of
from dsmixer.config.checks import check_recipe
from dsmixer.config.comparison import LoadedComparison
from dsmixer.config.errors import UserError
from dsmixer.config.explain import nearest_key
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.config.schema import RunConfig

Kind = Literal["experts", "variant", "method"]
ANSWERING = "seconds_per_example"
"""The measure for which a variant's mixture is scored as other methods are, without a look at its routers."""


@dataclass(frozen=True)
class Trunk:
    """The experts that some variants share.

    Attributes:
        digest: of the recipe that they come from; names their folder.
        variants: labels of the variants on them, in order.
        trained: whether a cell of their own trains them; else each variant's cell holds them itself.
    """

    digest: str
    variants: tuple[str, ...]
    trained: bool


@dataclass(frozen=True)
class Cell:
    """One process of a comparison.

    Attributes:
        kind: stage one, a variant, or one of the other methods.
        name: such as ``cells/RSL/seed-0``, from the comparison's folder.
        label: of the variant; the name of the method; of experts, the digest of the trunk.
        trunk: digest of the trunk it belongs to.
        seed: of everything in it.
        folder: its run folder; of a method, the run folder that it is scored on.
        needs: name of the cell that has to be done before, or None.
        raw: values of its recipe, as they are written; of a method, what is asked of it.
        recipe: the same resolved; None for a method.
        times: label of the variant whose mixture is scored once more, as other methods are, to tell how long
            it takes to answer; None: it is no such cell.
    """

    kind: Kind
    name: str
    label: str
    trunk: str
    seed: int
    folder: Path
    needs: str | None
    raw: dict[str, Any]
    recipe: LoadedRecipe | None = None
    times: str | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison, resolved.

    Attributes:
        loaded: its file.
        folder: that holds all of it.
        variants: those that are asked for, in order.
        trunks: theirs.
        cells: in an order in which each comes after what it needs.
        whole: the whole recipe of each variant on each seed, which is what is checked.
        only: the variants that were asked for by name; none: all.
    """

    loaded: LoadedComparison
    folder: Path
    variants: tuple[Variant, ...]
    trunks: tuple[Trunk, ...]
    cells: tuple[Cell, ...]
    whole: tuple[VariantRecipe, ...] = field(repr=False)
    only: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.loaded.comparison.seeds

    def log(self, cell: Cell) -> Path:
        """The file that takes a cell's output."""
        return self.folder / "logs" / f"{cell.name}.log"


def make_plan(loaded: LoadedComparison, only: Sequence[str] = ()) -> Plan:
    """Resolve a comparison; nothing is written and nothing checked against files.

    Args:
        loaded: its file.
        only: names or labels of variants, where not all of them are wanted.

    Raises:
        UserError: a variant changes a key that is not there or to a wrong value, or is not known.
    """
    variants = _chosen(variants_of(loaded), only)
    folder = comparison_folder(loaded)
    seeds = loaded.comparison.seeds
    recipes = {
        (variant.label, seed): variant_recipe(loaded, variant, seed) for seed in seeds for variant in variants
    }
    digests = {variant.label: trunk_digest(recipes[variant.label, seeds[0]]) for variant in variants}
    trunks = []
    for digest in dict.fromkeys(digests.values()):
        on_it = tuple(variant.label for variant in variants if digests[variant.label] == digest)
        trained = recipes[on_it[0], seeds[0]].trains_experts
        trunks.append(Trunk(digest, on_it, trained))
    cells: list[Cell] = []
    for seed in seeds:
        for trunk in trunks:
            own = [recipes[label, seed] for label in trunk.variants]
            cells += _cells(loaded, folder, trunk, own, seed)
    return Plan(
        loaded, folder, tuple(variants), tuple(trunks), tuple(cells), tuple(recipes.values()), tuple(only)
    )


def comparison_folder(loaded: LoadedComparison) -> Path:
    """``DIR/NAME[-SCALE]``: ``run.dir``, and ``run.name`` where it is written."""
    run = loaded.raw.get("run") or {}
    run = run if isinstance(run, dict) else {}
    name = str(run.get("name") or loaded.comparison.name)
    scale = f"-{safe_name(loaded.scale)}" if loaded.scale is not None else ""
    return Path(str(run.get("dir") or RunConfig().dir)) / f"{name}{scale}"


def check_plan(plan: Plan) -> None:
    """Refuse a comparison of which any cell would be refused.

    A stage two is checked as part of the variant's whole recipe: the mixture that it starts from is not there
    yet.

    Raises:
        UserError: of the first such cell, with its variant.
    """
    by_label = {variant.label: variant for variant in plan.variants}
    for whole in plan.whole:
        told_of(whole.variant, lambda whole=whole: check_recipe(whole.loaded))
    trunk_of = {trunk.digest: trunk for trunk in plan.trunks}
    for cell in plan.cells:
        if cell.recipe is not None and (cell.kind == "experts" or cell.needs is None):
            variant = by_label[trunk_of[cell.trunk].variants[0] if cell.kind == "experts" else cell.label]
            told_of(variant, lambda recipe=cell.recipe: check_recipe(recipe))


def _chosen(variants: list[Variant], only: Sequence[str]) -> list[Variant]:
    for wanted in only:
        names = dict.fromkeys(name for variant in variants for name in (variant.name, variant.label))
        if wanted not in names:
            near = nearest_key(wanted, list(names))
            fix = f"write {near}" if near else f"write one of {'; '.join(names)}"
            raise UserError(f"no variant is called {wanted!r}", where="--only", fix=fix)
    return [v for v in variants if not only or v.name in only or v.label in only]


def _cells(
    loaded: LoadedComparison, folder: Path, trunk: Trunk, recipes: Sequence[VariantRecipe], seed: int
) -> Iterable[Cell]:
    """Of one trunk on one seed: its experts, its variants, and each of the other methods on its experts."""
    base = _experts_cell(loaded, folder, trunk, recipes[0], seed) if trunk.trained else None
    if base is not None:
        yield base
    variants = []
    for whole in recipes:
        name = f"cells/{whole.variant.folder}/seed-{seed}"
        own = folder / name
        raw = routers_raw(whole, own, base.folder) if base is not None else whole_raw(whole, own)
        needs = None if base is None else base.name
        label = whole.variant.label
        variants.append(
            Cell("variant", name, label, trunk.digest, seed, own, needs, raw, whole.with_raw(raw))
        )
    yield from variants
    if ANSWERING in loaded.comparison.measures:
        for whole, cell in zip(recipes, variants, strict=True):
            name = f"answers/{whole.variant.folder}/seed-{seed}"
            yield dataclasses.replace(_method_cell(loaded, "mixture", cell), name=name, times=cell.label)
    for method in loaded.comparison.methods:
        yield _method_cell(loaded, method, base or variants[0])


def _method_cell(loaded: LoadedComparison, method: str, scored: Cell) -> Cell:
    """One of the other methods, on the experts of a run."""
    evaluation = {k: v for k, v in (scored.raw.get("evaluation") or {}).items() if k != "batch_size"}
    settings = loaded.comparison.method_settings.get(method, {})
    assert scored.recipe is not None
    of = f"{scored.trunk}/{recipe_digest(scored.recipe.recipe)}"
    asked = {"method": method, "settings": settings, "evaluation": evaluation, "of": of}
    name = f"methods/{scored.trunk}/{safe_name(method)}/seed-{scored.seed}"
    return Cell("method", name, method, scored.trunk, scored.seed, scored.folder, scored.name, asked)


def _experts_cell(
    loaded: LoadedComparison, folder: Path, trunk: Trunk, whole: VariantRecipe, seed: int
) -> Cell:
    name = f"experts/{trunk.digest}/seed-{seed}"
    own = folder / name
    raw = experts_raw(whole, own, dict(loaded.raw.get("evaluation") or {}))
    return Cell("experts", name, trunk.digest, trunk.digest, seed, own, None, raw, whole.with_raw(raw))


def plan_text(plan: Plan) -> dict[str, Any]:
    """The comparison and its recipe as plain values, for ``comparison.yaml``."""
    comparison = json.loads(plan.loaded.comparison.model_dump_json())
    trunks = {trunk.digest: list(trunk.variants) for trunk in plan.trunks}
    scale = {"scale": plan.loaded.scale} if plan.loaded.scale else {}
    return {
        "file": str(plan.loaded.path),
        **scale,
        "comparison": comparison,
        **plan.loaded.raw,
        "trunks": trunks,
    }
