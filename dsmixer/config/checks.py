"""Every check between keys that needs no model, no record and no DeepSpeed."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable

from dsmixer.config.batch import accumulation_steps, check_world
from dsmixer.config.ds_checks import check_ds_config
from dsmixer.config.ds_json import merge_ds_config, resolved_zero_stage
from dsmixer.config.errors import UserError
from dsmixer.config.explain import nearest_key
from dsmixer.config.from_mixture import check_mixture
from dsmixer.config.recipe import STAGES, LoadedRecipe, expert_names
from dsmixer.config.secrets import check_no_secrets
from dsmixer.config.stages import RslConfig, Stage2Config

__all__ = [
    "HUB_ID",
    "MAX_HARD_SOFT_EXPERTS",
    "accumulation_steps",
    "check_domain_experts",
    "check_outputs_here",
    "check_recipe",
    "check_routing",
    "check_world",
    "is_local_path",
    "needs_outputs",
]

MAX_HARD_SOFT_EXPERTS = 32
"""``hard_soft`` computes every expert for every token; above this many it is refused."""

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
"""A hub id with its revision, if any: ``NAME``, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""


def check_recipe(loaded: LoadedRecipe, ds_path: str | None = None) -> None:
    """Refuse a recipe whose keys do not go together, or that names files which are not there.

    Args:
        loaded: the recipe, with or without its DeepSpeed file merged in.
        ds_path: a DeepSpeed JSON file from the command line, or None for the recipe's.

    Raises:
        UserError: naming the place of the key, what was found and what to write.
    """
    merged, _ = merge_ds_config(loaded, ds_path)
    for check in (*_CHECKS, check_ds_config):
        check(merged)


def is_local_path(text: str) -> bool:
    """Whether a data set or model is meant as a file or folder, present or not, rather than as a hub id."""
    names_file = text.endswith(_DATA_SUFFIXES) or text.partition("@")[0].endswith(_DATA_SUFFIXES)
    as_path = names_file or HUB_ID.fullmatch(text) is None
    return as_path or os.path.exists(text)


def _check_stages(loaded: LoadedRecipe) -> None:
    recipe = loaded.recipe
    if not recipe.stage1.enabled and not recipe.stage2.enabled:
        fix = "set stage1.enabled or stage2.enabled to true"
        raise UserError("both stages are disabled", where=loaded.where("stage2.enabled"), fix=fix)
    for name in STAGES:
        stage = loaded.stage(name)
        if stage.enabled:
            at_once = stage.micro_batch_size
            if stage.global_batch_size is None or stage.global_batch_size % at_once:
                accumulation_steps(loaded, name, 1)


def _check_base(loaded: LoadedRecipe) -> None:
    base = loaded.recipe.base
    if base.quantization == "none" and not base.double_quantization:
        raise UserError(
            "this is about the scales of 4-bit weights, and base.quantization is none",
            where=loaded.where("base.double_quantization"),
            fix="remove it, or write base.quantization: nf4",
        )
    if base.attention == "flash_attention_2" and base.dtype == "float32":
        where = loaded.where("base.attention")
        fix = "write sdpa, or base.dtype: bfloat16"
        raise UserError("flash_attention_2 has no float32 form (base.dtype)", where=where, fix=fix)
    _check_exists(loaded, "base.model", base.model)


def _check_domains(loaded: LoadedRecipe) -> None:
    data = loaded.recipe.data
    if not data.domains and data.source is None:
        fix = "write data.domains: [{name: NAME, train: FILE_OR_HUB_ID}, ...], or data.source with its column"
        raise UserError("no domain to train on", where=loaded.where("data.domains"), fix=fix)
    _check_once(loaded, "data.domains", [domain.name for domain in data.domains])
    for index, domain in enumerate(data.domains):
        for key, value in (("train", domain.train), ("test", domain.test)):
            _check_exists(loaded, f"data.domains.{index}.{key}", value)
    if data.source is not None:
        for key, value in (("train", data.source.train), ("test", data.source.test)):
            _check_exists(loaded, f"data.source.{key}", value)
    _check_exists(loaded, "stage2.data.source", loaded.recipe.stage2.data.source)


def _check_held_out(loaded: LoadedRecipe) -> None:
    data, where = loaded.recipe.stage2.data, loaded.where("stage2.data.held_out")
    if data.held_out is None:
        return
    if data.source is not None:
        problem = f"examples of the domains are kept for the routers, which train on {data.source} instead"
        raise UserError(problem, where=where, fix="remove held_out, or write stage2.data.source: null")
    if data.max_examples > data.held_out:
        raise UserError(
            f"{data.max_examples} examples for the routers, and {data.held_out} are kept for them ({where})",
            where=loaded.where("stage2.data.max_examples"),
            fix=f"write at most {data.held_out}, or raise held_out",
        )


def _check_experts(loaded: LoadedRecipe) -> None:
    recipe = loaded.recipe
    experts = recipe.mixer.experts
    if experts is None:
        return
    names = [expert.name for expert in experts]
    if not names:
        fix = "name the experts, or write null for one a domain"
        raise UserError("no expert", where=loaded.where("mixer.experts"), fix=fix)
    _check_once(loaded, "mixer.experts", names)
    for index, domain in enumerate(recipe.data.domains):
        key = f"data.domains.{index}." + ("name" if domain.expert is None else "expert")
        _check_known(loaded, key, domain.expert or domain.name, names)
    for index, expert in enumerate(experts):
        _check_exists(loaded, f"mixer.experts.{index}.path", expert.path)


def check_domain_experts(loaded: LoadedRecipe, served: list[str], names: list[str]) -> None:
    """Refuse domains, named by a column of the data, that no expert of the recipe serves.

    Raises:
        UserError: names the first of them.
    """
    for name in served:
        if name not in names:
            raise UserError(
                f"the data has a domain {name!r}, and no expert is called so",
                where=loaded.where("data.source.column"),
                fix=f"add it to mixer.experts ({', '.join(names[:20])}), or write mixer.experts: null",
            )


def _check_expert_origins(loaded: LoadedRecipe) -> None:
    """Stage one makes experts; imported ones and ones that nothing trains have no place in it."""
    recipe = loaded.recipe
    served = {domain.expert or domain.name for domain in recipe.data.domains}
    for index, expert in enumerate(recipe.mixer.experts or ()):
        if recipe.stage1.enabled and expert.path is not None:
            raise UserError(
                f"expert {expert.name!r} is imported, and stage one trains new experts",
                where=loaded.where(f"mixer.experts.{index}.path"),
                fix="set stage1.enabled: false, or remove the path",
            )
        trained = recipe.mixer.mixture is not None or recipe.data.source is not None
        if recipe.stage1.enabled and not trained and expert.name not in served:
            raise UserError(
                f"no domain is served by expert {expert.name!r}, so stage one would never train it",
                where=loaded.where(f"mixer.experts.{index}.name"),
                fix=f"add a domain with expert: {expert.name}, or remove the expert",
            )
    starts_new = recipe.mixer.mixture is None
    if starts_new and not recipe.stage1.enabled and recipe.stage2.experts == "frozen":
        imported = {expert.name for expert in recipe.mixer.experts or () if expert.path is not None}
        new = [name for name in expert_names(recipe) or () if name not in imported]
        if new:
            raise UserError(
                f"nothing would ever train expert {new[0]!r}: stage one is disabled and the expert is frozen",
                where=loaded.where("stage2.experts"),
                fix="give it a path in mixer.experts, or write stage2.experts: preserve, or enable stage one",
            )


def _check_routing(loaded: LoadedRecipe) -> None:
    names = expert_names(loaded.recipe)
    if loaded.recipe.stage2.enabled:
        check_routing(loaded, names)


def check_routing(loaded: LoadedRecipe, names: list[str] | None) -> None:
    """Refuse a stage two that does not go with the pool.

    Args:
        loaded: the recipe.
        names: of the experts; None where the data has yet to say them.

    Raises:
        UserError: too many experts a token, one expert alone, unknown names, or a router without gradient.
    """
    stage = loaded.recipe.stage2
    where = loaded.where("stage2.top_k")
    if (
        stage.routing == "topk"
        and stage.top_k == 1
        and stage.renormalize
        and (names is None or len(names) > 1)
    ):
        fix = "write top_k: 2, or renormalize: false"
        problem = "one expert a token, renormalised, always weighs 1: the router learns nothing from the task"
        raise UserError(problem, where=where, fix=fix)
    if names is None:
        return
    if len(names) == 1:
        fix = "add a domain, or write stage2.enabled: false"
        raise UserError(
            "there is one expert and nothing to route", where=loaded.where("stage2.enabled"), fix=fix
        )
    if stage.top_k > len(names) and loaded.said("stage2.top_k"):  # unwritten, it is at most their number
        fix = f"write at most {len(names)}"
        raise UserError(f"{stage.top_k} experts a token, of {len(names)} experts", where=where, fix=fix)
    if stage.routing == "hard_soft" and len(names) > MAX_HARD_SOFT_EXPERTS:
        problem = f"hard_soft computes all {len(names)} experts for every token"
        fix = f"write topk, or have at most {MAX_HARD_SOFT_EXPERTS} experts"
        raise UserError(problem, where=loaded.where("stage2.routing"), fix=fix)
    if stage.preserve.experts != "all":
        for name in stage.preserve.experts:
            _check_known(loaded, "stage2.preserve.experts", name, names)
    if stage.routers != "all":
        _check_router_rows(loaded, stage.routers, names)


def _check_router_rows(loaded: LoadedRecipe, rows: tuple[str, ...], names: list[str]) -> None:
    where = loaded.where("stage2.routers")
    if not rows:
        fix = "name an expert, or write all"
        raise UserError("no row of the routers would train", where=where, fix=fix)
    for name in rows:
        _check_known(loaded, "stage2.routers", name, names)
    if loaded.recipe.mixer.mixture is None:
        problem = "nothing would ever train the rows of the other experts, which no mixture brings"
        raise UserError(problem, where=where, fix="write all, or start from a mixture: mixer.mixture: FOLDER")


def _check_routing_loss(loaded: LoadedRecipe) -> None:
    """Settings of RSL where RSL is not the loss, and labels where examples have none."""
    stage = loaded.recipe.stage2
    method = stage.routing_loss
    names = [method] if isinstance(method, str) else [term.loss for term in method]
    if stage.data.source is not None and {"meteora", "supervised_gate", "supervised_margin"} & set(names):
        problem = "this loss is told each token's expert, and examples of stage2.data.source have no domain"
        fix = "write stage2.data.source: null, or choose another loss"
        raise UserError(problem, where=loaded.where("stage2.routing_loss"), fix=fix)
    other = loaded.where("stage2.routing_loss")
    check_outputs_here(loaded)
    if method == "lora_mixer" or other.startswith(
        "command line: "
    ):  # which takes the place of a recipe's RSL
        return
    usual = RslConfig().model_dump()  # a resolved recipe has every default written out
    for key, value in loaded.written.items():
        name = key.removeprefix("stage2.rsl.")
        if name != key and name != "ramp" and value != usual[name]:
            problem = f"this is a setting of RSL, and {other} chooses another loss"
            fix = "remove it, or write routing_loss: lora_mixer, or [{loss: rsl, settings: {...}}, ...]"
            raise UserError(problem, where=loaded.where(key), fix=fix)


def needs_outputs(stage: Stage2Config) -> bool:
    """Whether a loss of the stage reads what each expert of a token puts out."""
    method = stage.routing_loss
    if isinstance(method, str):
        return method == "aesl"
    return any(term.loss == "aesl_orthogonality" for term in method)


def check_outputs_here(loaded: LoadedRecipe) -> None:
    """Refuse a loss on the outputs of a token's experts where these are not on its rank and whole.

    Raises:
        UserError: the recipe asks for such a loss and for a placement or ZeRO stage that spreads experts.
    """
    if not (loaded.recipe.stage2.enabled and needs_outputs(loaded.recipe.stage2)):
        return
    placement, zero = loaded.recipe.placement, resolved_zero_stage(loaded.recipe)
    said = loaded.where("stage2.routing_loss")
    reasons = {"tokens": "its experts are on several ranks", "weights": "their weights are cut by ZeRO-3"}
    reason, key = reasons.get(placement.mode), "placement.mode"
    if reason is None and zero == 3:
        reason, key = reasons["weights"], "deepspeed.zero_stage"
    if reason is None:
        return
    problem = f"AESL's orthogonality ({said}) reads what each expert of a token puts out, and here {reason}"
    fix = (
        "write placement.mode: replicate with deepspeed.zero_stage: 0, 1 or 2, or only the method's other "
        "terms, routing_loss: [{loss: switch, settings: {alpha: 0.001}}, {loss: aesl_variance}]"
    )
    raise UserError(problem, where=loaded.where(key), fix=fix)


def _check_placement(loaded: LoadedRecipe) -> None:
    placement, zero = loaded.recipe.placement, resolved_zero_stage(loaded.recipe)
    where = loaded.where("placement.mode")
    if placement.expert_parallel_size not in ("auto", 1) and placement.mode != "tokens":
        problem = f"experts are spread over {placement.expert_parallel_size} ranks in mode tokens only"
        size_where = loaded.where("placement.expert_parallel_size")
        raise UserError(problem, where=size_where, fix="write placement.mode: tokens, or auto here")
    stage_where = loaded.where("deepspeed.zero_stage")
    if placement.mode == "replicate" and zero == 3:
        problem = f"replicate does not go with ZeRO stage 3 ({stage_where})"
        raise UserError(problem, where=where, fix="write weights or auto, or deepspeed.zero_stage: 2")
    if placement.mode == "tokens" and zero == 0:
        problem = f"tokens does not go with ZeRO stage 0 ({stage_where})"
        raise UserError(problem, where=where, fix="write deepspeed.zero_stage: 1, 2 or 3")
    if placement.mode == "weights" and zero != 3:
        problem = f"weights goes with ZeRO stage 3 only, not {zero} ({stage_where})"
        raise UserError(problem, where=where, fix="write replicate or auto, or deepspeed.zero_stage: 3")


def _check_targets(loaded: LoadedRecipe) -> None:
    target, times = Counter(loaded.recipe.mixer.targets).most_common(1)[0]
    if times > 1:
        where = loaded.where("mixer.targets")
        raise UserError(f"{target!r} is named {times} times", where=where, fix="name it once")


_CHECKS: tuple[Callable[[LoadedRecipe], None], ...] = (
    check_no_secrets,
    _check_stages,
    _check_base,
    _check_domains,
    _check_held_out,
    check_mixture,
    _check_experts,
    _check_expert_origins,
    _check_targets,
    _check_routing,
    _check_routing_loss,
    _check_placement,
)


def _check_exists(loaded: LoadedRecipe, key: str, value: str | None) -> None:
    if value is None or not is_local_path(value) or os.path.exists(value):
        return
    fix = "check the path" if os.path.isabs(value) else f"check the path, taken from {os.getcwd()}"
    if value.startswith("~"):
        fix = "write the whole path: ~ is not expanded"
    raise UserError(f"no such file or folder: {value}", where=loaded.where(key), fix=fix)


def _check_once(loaded: LoadedRecipe, key: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            first = loaded.where(f"{key}.{names.index(name)}.name")
            problem = f"{name!r} is taken by {first}"
            raise UserError(problem, where=loaded.where(f"{key}.{index}.name"), fix="give each its own name")


def _check_known(loaded: LoadedRecipe, key: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    near = nearest_key(name, names)
    fix = f"write {near}" if near else f"write one of {', '.join(names[:20])}"
    if key.endswith(".name"):
        fix = f"add expert: with the expert that serves the domain, one of {', '.join(names[:20])}"
    raise UserError(f"no expert is called {name!r}", where=loaded.where(key), fix=fix)
