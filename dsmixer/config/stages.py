"""The two training stages of a recipe: ``stage1`` (experts) and ``stage2`` (routers)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What a run, domain or expert may be called: it becomes a folder, so no separator and no leading dot."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class StageConfig(Section):
    """How one stage walks over its data and steps its optimizer."""

    enabled: bool = Field(default=True, description="whether the stage runs")
    learning_rate: float = Field(
        default=1e-5, gt=0, description="peak learning rate, reached after the warm-up"
    )
    epochs: int = Field(
        default=1, ge=1, description="passes over the data; max_steps, if set, decides instead"
    )
    max_steps: Count | None = Field(
        default=None, description="optimizer steps; null: as many as the epochs take"
    )
    micro_batch_size: int = Field(default=1, ge=1, description="rows a rank puts through the model at a time")
    gradient_accumulation_steps: Count | None = Field(
        default=4, description="micro-batches an optimizer step; null: follows from global_batch_size"
    )
    global_batch_size: Count | None = Field(
        default=None,
        description="rows an optimizer step over all ranks; accumulation then follows from the world size",
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=1, description="share of the steps in which the rate rises from zero"
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="how the learning rate falls to zero after the warm-up, or that it stays",
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0,
        description="largest gradient norm, kept for each expert by itself and for the routers; null: none",
    )
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Field(
        default=(0.9, 0.999), description="Adam's decay rates of the first and second moment"
    )
    eps: float = Field(default=1e-8, gt=0, description="Adam's term that keeps the division finite")
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled weight decay, times the learning rate a step"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="AdamW with the experts' moments in float32 or in 8 bits (routers keep float32); paged: "
        "in memory that the driver moves to the host when the GPU has too little",
    )


class RouterDataConfig(Section):
    """The small mixed set that trains the routers."""

    max_examples: int = Field(
        default=2000, ge=1, description="examples the routers train on, over all domains"
    )
    max_share: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="largest share of a domain's train part that is kept from stage one for this",
    )
    held_out: Count | None = Field(
        default=None,
        description="examples kept from stage one over all domains, also where stage two is not enabled; the "
        "routers train on max_examples of them, a smaller set within a larger one; null: max_examples, where "
        "stage two is enabled",
    )
    source: Text | None = Field(
        default=None, description="file or hub id of a mixed set; null: held out of the domains' train parts"
    )


class RslConfig(Section):
    """The routing specialisation loss (arXiv 2507.00029, eq. 5) of stage two."""

    alpha: float = Field(
        default=0.1, ge=0, description="weight of the load balance term, sum of mean probability x usage"
    )
    entropy_weight: float = Field(
        default=0.05, ge=0, description="weight (lambda) of the mean token entropy, in nats"
    )
    entropy: Literal["specialize", "paper_eq5"] = Field(
        default="specialize",
        description="specialize penalises token entropy; paper_eq5 rewards it, as eq. 5 is printed",
    )
    usage: Literal["topk", "top1", "smooth"] = Field(
        default="topk",
        description="what counts as usage: mean renormalised top-k weight, share of top-1 choices, a softmax",
    )
    usage_from: Literal["previous_step", "micro_batch"] = Field(
        default="previous_step",
        description="where usage is counted: all ranks in the step before, or this micro-batch",
    )
    ramp: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="share of the steps in which the weight of the routing loss, of any kind, rises from 0",
    )
    smooth_temperature: float = Field(default=1.0, gt=0, description="temperature of the smooth usage")


RoutingMethod = Literal[
    "lora_mixer", "switch", "mixlora", "ds_moe", "gmoe", "aesl", "mole", "meteora", "dynmole", "none"
]
RoutingLossName = Literal[
    "rsl",
    "switch",
    "auxiliary",
    "quadratic",
    "mixlora",
    "z",
    "tsallis",
    "mutual_information",
    "mole",
    "gmoe_poisson",
    "gmoe_normal",
    "aesl_orthogonality",
    "aesl_variance",
    "supervised_gate",
    "supervised_margin",
]
Setting = float | int | str | None


class RoutingTermConfig(Section):
    """One loss on the routers."""

    loss: RoutingLossName = Field(description="which loss")
    settings: dict[str, Setting] = Field(
        default_factory=dict,
        description="its settings, such as {alpha: 0.01}; what is left out has its default",
    )


class PreserveConfig(Section):
    """The pull of trained experts towards what stage one made of them."""

    beta: float = Field(
        default=5e-5, ge=0, description="weight of the squared distance from the stage-one values"
    )
    experts: Literal["all"] | Annotated[tuple[Name, ...], Strict(False)] = Field(
        default="all", description="all, or a list of the experts that are held"
    )
    origin: Literal["device", "host"] = Field(
        default="device",
        description="where the stage-one values are kept: beside the moments, or in the memory of the host",
    )


class Stage2Config(StageConfig):
    """Stage two: routers, and how far the experts may move with them."""

    routing: Literal["soft", "topk", "hard_soft", "top_p"] = Field(
        default="topk",
        description="soft: every expert; topk: the top_k best; hard_soft: topk forward, gradient of soft; "
        "top_p: as many as reach the mass top_p",
    )
    inference_routing: Literal["soft", "topk", "top_p"] | None = Field(
        default=None,
        description="how the trained mixture routes in use and in evaluation; null: as routing says. topk "
        "after routing: soft is dense training with sparse inference",
    )
    top_k: int = Field(
        default=3, ge=1, description="experts a token; where unwritten, at most as many as there are"
    )
    renormalize: bool = Field(
        default=True, description="whether the chosen experts' weights are made to sum to 1"
    )
    top_p: float = Field(
        default=0.9, gt=0, le=1, description="probability mass that the experts of a token reach, for top_p"
    )
    experts: Literal["frozen", "preserve"] = Field(
        default="preserve",
        description="frozen: only routers train; preserve: experts train too, held by stage2.preserve",
    )
    routers: Literal["all"] | Annotated[tuple[Name, ...], Strict(False)] = Field(
        default="all",
        description="all, or a list of experts: of the routers only their rows train, and the others stay as "
        "they are",
    )
    router_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="peak learning rate of the routers; null: that of the stage"
    )
    data: RouterDataConfig = Field(default_factory=RouterDataConfig, description="what the routers train on")
    routing_loss: RoutingMethod | Annotated[tuple[RoutingTermConfig, ...], Strict(False)] = Field(
        default="lora_mixer",
        description="loss on the routers beside the task's: lora_mixer is RSL as stage2.rsl sets it, the "
        "others are methods at their own coefficients; or a list of losses with their settings",
    )
    rsl: RslConfig = Field(default_factory=RslConfig, description="the routing specialisation loss")
    preserve: PreserveConfig = Field(
        default_factory=PreserveConfig, description="how trained experts are held"
    )
