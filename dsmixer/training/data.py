"""A run's data: domains, the routers' share of them, tokens, and the order of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dsmixer.config.batch import accumulation_steps
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe
from dsmixer.config.schema import Recipe
from dsmixer.data.collate import MicroBatch, StepBatch, step_batch
from dsmixer.data.domains import Domain, domain_ids, load_domains
from dsmixer.data.encode import pad_token_id
from dsmixer.data.holdout import hold_out_router_examples
from dsmixer.data.records import Example
from dsmixer.data.sampler import StepSampler
from dsmixer.data.store import TokenStore
from dsmixer.data.tokenize import tokenize_examples
from dsmixer.model.load import read_config
from dsmixer.model.streams import decoder_start
from dsmixer.training.nodes import tokenize_on_nodes
from dsmixer.training.world import World

EXAMPLES_NAMED = 4


@dataclass(frozen=True)
class RunData:
    """The domains of a run, and the examples kept from stage one for the routers.

    Attributes:
        domains: with the examples that are left to stage one.
        router_examples: what the routers train on, where stage two is on or ``stage2.data.held_out`` says
            that examples are kept.
        num_skipped: bad records passed over, of the domains and of the routers' own source; those that name
            no domain of the run are in the quarantine file alone.
    """

    domains: list[Domain]
    router_examples: list[Example]
    num_skipped: int = 0

    @property
    def domain_names(self) -> list[str]:
        return [domain.name for domain in self.domains]

    def expert_names(self, recipe: Recipe) -> list[str]:
        """The pool: the recipe's experts, or one a domain in order of first appearance."""
        if recipe.mixer.experts is not None:
            return [spec.name for spec in recipe.mixer.experts]
        return list(dict.fromkeys(domain.expert for domain in self.domains))

    def expert_of_domain(self, experts: Sequence[str]) -> list[int]:
        """Index of the expert that serves each domain, -1 where the pool has none."""
        return [experts.index(d.expert) if d.expert in experts else -1 for d in self.domains]


def keeps_router_examples(recipe: Recipe) -> bool:
    """Whether a run has examples for the routers, be it that stage two of another run trains on them."""
    return recipe.stage2.enabled or recipe.stage2.data.held_out is not None


def load_run_data(recipe: Recipe, quarantine: Path | None) -> RunData:
    """Read the domains; where stage two is on, or the recipe says how many, keep its share from stage one.

    Args:
        recipe: the run's.
        quarantine: file for the bad records that this reading skips, begun anew; None: they are only counted.

    Raises:
        UserError: data are missing or bad, or the quarantine file cannot be written.
    """
    if quarantine is not None:
        _forget(quarantine)
    seed = recipe.run.seed
    domains = load_domains(recipe.data, seed=seed, quarantine=quarantine)
    num_skipped = sum(domain.skipped for domain in domains)
    if not keeps_router_examples(recipe):
        return RunData(domains, [], num_skipped)
    domains, router_examples, of_source = hold_out_router_examples(
        domains,
        recipe.stage2.data,
        seed,
        on_bad_record=recipe.data.on_bad_record,
        quarantine=quarantine,
    )
    return RunData(domains, router_examples, num_skipped + of_source)


def _forget(quarantine: Path) -> None:
    try:
        quarantine.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the quarantine file: {error}", where=str(quarantine)) from error


@dataclass(frozen=True)
class StageData:
    """The tokens of a stage and the order of its steps; ``expert_parallel_size`` is known with the plan."""

    store: TokenStore
    sampler: StepSampler
    domains: tuple[str, ...]
    world: World
    micro_batch_size: int
    pad_token_id: int
    expert_parallel_size: int = 1

    def batch(self, step: int) -> StepBatch:
        """This rank's share of a step."""
        return step_batch(
            self.sampler,
            self.store,
            step,
            world_rank=self.world.rank,
            world_size=self.world.size,
            micro_batch_size=self.micro_batch_size,
            pad_token_id=self.pad_token_id,
            expert_parallel_size=self.expert_parallel_size,
        )

    def describe(self, micro: MicroBatch) -> str:
        """Domains and places of a micro-batch's examples, for messages."""
        examples = [i for i in micro.example_ids.unique().tolist() if i >= 0]
        named = [f"{self.domains[self.store.domain_ids[i]]} {self.store.locations[i]}" for i in examples]
        more = len(named) - EXAMPLES_NAMED
        return ", ".join(named[:EXAMPLES_NAMED]) + (f" and {more} more" if more > 0 else "")


def stage_data(
    loaded: LoadedRecipe,
    number: int,
    data: RunData,
    experts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> StageData:
    """Tokenise a stage's examples and fix the order of its steps.

    Args:
        loaded: the run's recipe.
        number: of the stage, 1 or 2.
        data: of the run.
        experts: names of the pool, in order.
        tokenizer: the base's.
        world: the ranks that share a step.
    """
    recipe, stage = loaded.recipe, loaded.stage(f"stage{number}")
    accumulation = accumulation_steps(loaded, f"stage{number}", world.size)
    examples = data.router_examples
    if number == 1:
        examples = [example for domain in data.domains for example in domain.train]
    if not examples:
        raise UserError("no example to train on", where="data.domains", fix="raise max_train, or add data")
    names = data.domain_names
    weights = [domain.weight if number == 1 else 1.0 for domain in data.domains]
    if number == 2:
        weights.append(1.0)  # examples of no domain, from a source of the routers' own
    cache = Path(recipe.data.cache_dir) if recipe.data.cache_dir else None
    ids, start = domain_ids(examples, names), decoder_start(read_config(recipe.base))

    def tokenize(folder: str | Path | None) -> TokenStore:
        data = recipe.data
        return tokenize_examples(
            examples,
            ids,
            tokenizer,
            max_length=data.max_length,
            loss=data.loss,
            cache_dir=folder,
            decoder_start=start,
        )

    store = tokenize_on_nodes(world, tokenize, cache)
    sampler = StepSampler(
        store,
        weights=weights,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        global_batch_size=stage.micro_batch_size * accumulation * world.size,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
        seed=recipe.run.seed,
        experts=data.expert_of_domain(experts) if number == 1 else None,
        num_experts=len(experts) if number == 1 else 1,
    )
    return StageData(
        store, sampler, (*names, "router data"), world, stage.micro_batch_size, pad_token_id(tokenizer)
    )
