"""What can be found wrong with a run before the base's weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsmixer.config.checks import check_domain_experts, check_routing
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import STAGES, LoadedRecipe
from dsmixer.config.schema import Recipe
from dsmixer.data.chat import rendered
from dsmixer.evaluation.harness_tasks import read_tasks
from dsmixer.losses.choice import routing_terms
from dsmixer.model.load import bare_base, load_tokenizer
from dsmixer.model.quantized import check_packing_works
from dsmixer.model.streams import is_encoder_decoder
from dsmixer.model.targets import find_targets
from dsmixer.training.checkpoints import Checkpoints
from dsmixer.training.data import RunData, load_run_data
from dsmixer.training.standing import stands_alone
from dsmixer.training.starting import Start, read_start
from dsmixer.training.wandb_log import check_wandb
from dsmixer.training.world import once


def check_stage_order(recipe: Recipe, stages: Sequence[int], checkpoints: Checkpoints) -> None:
    """Refuse stage two by itself where stage one is still to come, and needed; a collective.

    Args:
        recipe: the run's.
        stages: asked for in this call.
        checkpoints: of the run.

    Raises:
        UserError: stage one has no finished checkpoint.
    """
    if not recipe.stage1.enabled or 1 in stages:
        return
    if once(checkpoints.world, checkpoints.folder.finished) or stands_alone(checkpoints, recipe):
        return
    saved = checkpoints.open(1)
    if saved is None or not saved.state.finished:
        raise UserError(
            "stage one of this run is not finished",
            where=str(checkpoints.folder.checkpoints(1)),
            fix="run the same command with --stages 1 or without --stages first",
        )


def _check_positions(loaded: LoadedRecipe, bare: PreTrainedModel) -> None:
    """Refuse rows longer than the base has positions."""
    positions = getattr(bare.config.get_text_config(), "max_position_embeddings", None)
    length = loaded.recipe.data.max_length
    if isinstance(positions, int) and length > positions:
        raise UserError(
            f"rows of {length} tokens, and the base has {positions} positions",
            where=loaded.where("data.max_length"),
            fix=f"write {positions} or less",
        )


def check_loss(loaded: LoadedRecipe, bare: PreTrainedModel) -> None:
    """Refuse a loss on what an encoder reads.

    Raises:
        UserError: ``data.loss`` is ``all`` and the base has an encoder.
    """
    if loaded.recipe.data.loss == "all" and is_encoder_decoder(bare.config):
        raise UserError(
            "the base reads prompts in its encoder, which predicts nothing",
            where=loaded.where("data.loss"),
            fix="write completion",
        )


def _check_paged(loaded: LoadedRecipe, device: torch.device) -> None:
    """Refuse paged moments where no driver moves pages."""
    for name in STAGES:
        stage = loaded.stage(name)
        if stage.enabled and stage.optimizer.startswith("paged") and device.type != "cuda":
            raise UserError(
                f"paged memory is that of CUDA GPUs, and this run is on a {device.type}",
                where=loaded.where(f"{name}.optimizer"),
                fix=f"write {stage.optimizer.removeprefix('paged_')}",
            )


def _check_tasks(loaded: LoadedRecipe, data: RunData) -> None:
    """Refuse tasks that could not be run at the end."""
    evaluation, where = loaded.recipe.evaluation, loaded.where("evaluation.tasks")
    if not evaluation.tasks or not evaluation.enabled:
        return
    later = f"after the run: dsmixer evaluate RUN --tasks {','.join(evaluation.tasks)}"
    read_tasks(evaluation.tasks, where=where, code_fix=f"{later} --run-generated-code")
    if not any(domain.test for domain in data.domains):
        problem = "tasks are run beside the evaluation of the domains, and no domain has a test part"
        raise UserError(problem, where=where, fix=f"give a domain a test part, or {later}")


def read_inputs(loaded: LoadedRecipe, quarantine: Path | None, device: torch.device) -> tuple[RunData, Start]:
    """Read data and adapters or a mixture, and hold them and the recipe against the base's structure.

    Args:
        loaded: the checked recipe.
        quarantine: file for bad records that are skipped; None: they are only counted.
        device: that will hold the base.

    Raises:
        UserError: the base is of a kind that can't be trained here or can't be packed, a target is not in
            it, or records or adapters are bad or do not fit it.
    """
    recipe = loaded.recipe
    check_wandb(loaded)
    bare = bare_base(recipe.base, packing=recipe.data.packing)
    _check_positions(loaded, bare)
    check_loss(loaded, bare)
    targets = [target.path for target in find_targets(bare, recipe.mixer.targets)]
    check_packing_works(recipe.base.quantization, device)
    _check_paged(loaded, device)
    start = read_start(recipe, bare, targets)
    data = load_run_data(recipe, quarantine)
    names = data.expert_names(recipe)
    if recipe.data.source is not None:
        check_domain_experts(loaded, [domain.expert for domain in data.domains], names)
    if recipe.stage2.enabled:
        check_routing(loaded, names)
        routing_terms(recipe.stage2)
    check_conversations(data, load_tokenizer(recipe.base.model, recipe.base.revision))
    _check_tasks(loaded, data)
    return data, start


def check_conversations(data: RunData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put conversations through the chat template now, where they would be read only hours later.

    Those are the routers' and the test examples; of the train examples, which are read next, the first.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    first = [example for domain in data.domains for example in domain.train[:1]]
    tests = [example for domain in data.domains for example in domain.test]
    for example in (*first, *tests, *data.router_examples):
        rendered(example, tokenizer)
