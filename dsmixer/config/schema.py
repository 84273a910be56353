"""The typed recipe: every section and key, its default, its unit and a line of help."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, Strict

from dsmixer.config.data_section import DataConfig, DomainConfig, RecordTemplate, SourceConfig
from dsmixer.config.stages import (
    NAME_PATTERN,
    Count,
    Name,
    PreserveConfig,
    RouterDataConfig,
    RslConfig,
    Section,
    Stage2Config,
    StageConfig,
    Text,
)

__all__ = [
    "NAME_PATTERN",
    "BaseConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DomainConfig",
    "EvaluationConfig",
    "ExpertSpec",
    "HealthConfig",
    "MixerSection",
    "PlacementConfig",
    "PreserveConfig",
    "Recipe",
    "RecordTemplate",
    "RouterDataConfig",
    "RslConfig",
    "RunConfig",
    "SourceConfig",
    "Stage2Config",
    "StageConfig",
    "schema_json",
]

LicenseName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$", max_length=100)]
EvaluationMethod = Literal["base", "experts", "uniform", "mixture", "experts@stage1"]


class RunConfig(Section):
    """Where a run is kept, and what its random numbers start from."""

    name: Name = Field(default="run", description="name of the run: its folder is dir/name")
    dir: Text = Field(default="runs", description="folder that holds the run folders")
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of data order, initial weights and dropout"
    )
    log_every: int = Field(default=1, ge=1, description="optimizer steps between two lines of metrics.jsonl")
    tensorboard: bool = Field(default=True, description="whether TensorBoard files are written")
    wandb: Text | None = Field(
        default=None, description="project of Weights & Biases that gets the metrics too; null: none"
    )
    license: LicenseName | None = Field(
        default=None, description="license in the model card, as the hub names it; null: other"
    )


class BaseConfig(Section):
    """The frozen language model."""

    model: Text = Field(description="folder or hub id of the base model")
    revision: Text | None = Field(
        default=None, description="hub branch, tag or commit; null: the default branch"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="type of the frozen weights and the products"
    )
    quantization: Literal["none", "nf4", "fp4"] = Field(
        default="none",
        description="4-bit storage of the frozen linear layers, unpacked to dtype as they are used",
    )
    double_quantization: bool = Field(
        default=True,
        description="whether the scales of 4-bit weights are stored in 8 bits: 0.52 bytes a weight, not 0.56",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto", description="attention implementation of transformers; auto: its own choice"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="whether a layer's activations are computed again in the backward pass instead of kept",
    )


class ExpertSpec(Section):
    """One expert of the pool."""

    name: Name = Field(description="name of the expert")
    rank: Count | None = Field(default=None, description="LoRA rank; null: the adapter's, or mixer.rank")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="LoRA alpha; null: the adapter's, or mixer.alpha"
    )
    path: Text | None = Field(
        default=None, description="folder or hub id of a PEFT adapter to start from; null: a new expert"
    )


class MixerSection(Section):
    """The experts and routers put on the base's projections."""

    targets: Annotated[tuple[Text, ...], Strict(False)] = Field(
        default=("q", "k", "v", "o"),
        min_length=1,
        description="projections that carry mixers, by role (attention q, k, v, o; state space in, x, dt, "
        "out; feed-forward gate, up, down) or by module name",
    )
    rank: int = Field(default=64, ge=1, description="LoRA rank R of an expert")
    alpha: float = Field(default=128.0, gt=0, description="LoRA alpha; an expert is scaled by alpha / R")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of the experts' inputs dropped in training"
    )
    rslora: bool = Field(default=False, description="whether an expert is scaled by alpha / sqrt(R) instead")
    router: Literal["per_projection", "per_block"] = Field(
        default="per_projection",
        description="one router a projection, or one for the projections that read the same input",
    )
    router_std: float = Field(
        default=0.02, gt=0, description="standard deviation of the routers' initial weights"
    )
    compute: Literal["auto", "loop", "dense", "grouped", "blocked", "fused"] = Field(
        default="auto", description="form in which the experts' sum is computed; the result is the same"
    )
    experts: Annotated[tuple[ExpertSpec, ...], Strict(False)] | None = Field(
        default=None, description="the experts of the pool; null: one new expert a domain"
    )
    mixture: Text | None = Field(
        default=None,
        description="folder of a published mixture, or of the run that holds it, whose experts and routers "
        "the run starts from; null: none. What it says of the mixers is then not written again",
    )
    transfer: bool = Field(
        default=False,
        description="whether the mixture may be of another kind of base, with modules of the same names and "
        "widths",
    )


class PlacementConfig(Section):
    """Where experts live among the ranks."""

    mode: Literal["auto", "replicate", "weights", "tokens"] = Field(
        default="auto",
        description="replicate: all on every rank; weights: gathered by ZeRO-3; tokens: sent to the experts",
    )
    expert_parallel_size: Literal["auto"] | Count = Field(
        default="auto", description="ranks over which the experts are spread, in mode tokens"
    )
    device_memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="memory of a rank's device that is planned with, in GB of 2**30 bytes; null: what a GPU "
        "has, and no limit on a CPU",
    )
    check_memory: bool = Field(
        default=True,
        description="whether a run is refused that by its plan does not fit; false: it is only told",
    )


class DeepSpeedConfig(Section):
    """What the DeepSpeed engine is told."""

    zero_stage: Literal["auto"] | Annotated[int, Field(ge=0, le=3)] = Field(
        default="auto",
        description="ZeRO stage; auto: of the file, or 3 for placement weights and 2 otherwise",
    )
    config: Text | None = Field(
        default=None, description="DeepSpeed JSON file, such as one of ds_configs/; null: none"
    )


class CheckpointConfig(Section):
    """When a run is saved."""

    every: int = Field(
        default=100,
        ge=1,
        description="optimizer steps between two checkpoints; the end of a stage is saved too",
    )
    keep: int = Field(default=3, ge=1, description="checkpoints kept of a stage, the newest ones")
    keep_every: Count | None = Field(
        default=None, description="also kept: checkpoints whose step is a multiple of this; null: none"
    )
    keep_best: bool = Field(
        default=False,
        description="also kept: of each stage the checkpoint whose steps since the one before had the least "
        "mean loss",
    )


class EvaluationConfig(Section):
    """What is measured after training."""

    enabled: bool = Field(default=True, description="whether the run ends with an evaluation")
    tasks: Annotated[tuple[Text, ...], Strict(False)] = Field(
        default=(),
        description="tasks of lm-evaluation-harness that the run answers at its end too, by name",
    )
    methods: Annotated[tuple[EvaluationMethod, ...], Strict(False)] | None = Field(
        default=None,
        min_length=1,
        description="what is scored, of base, experts, uniform and mixture, and of experts@stage1: the "
        "experts as they were before stage two; null: all but the last",
    )
    max_examples: Count | None = Field(default=None, description="most test examples a domain; null: all")
    generate_max_new_tokens: int = Field(default=64, ge=1, description="longest generated answer, in tokens")
    exact_match: bool = Field(default=True, description="whether answers are generated and compared")
    batch_size: Count | None = Field(
        default=None,
        description="examples scored at a time; null: rows of a micro-batch of the last stage, which take no "
        "more memory than training has",
    )


class HealthConfig(Section):
    """When a rank counts as lost, and what becomes of steps that are not finite."""

    heartbeat: bool = Field(
        default=True, description="whether a thread of each rank tells the others that the rank is alive"
    )
    silence: float = Field(
        default=30.0,
        ge=10,
        description="seconds without a sign of life after which a rank counts as stopped, in the training "
        "loop; hang_timeout if that is less",
    )
    hang_timeout: float = Field(
        default=600.0,
        gt=0,
        description="seconds without progress after which a rank counts as hung, in the training loop, or "
        "ten median steps if that is more; also, with half a minute more and at least 60, how long ranks "
        "wait for each other at the start",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="when a loss, gradient or router is not finite: stop, or skip the step on all ranks",
    )
    max_skipped: int = Field(default=10, ge=1, description="most steps skipped in a run, over all its starts")
    warnings: bool = Field(
        default=True, description="whether loss spikes, dead experts and collapsed routing are warned of"
    )
    loss_spike: float = Field(
        default=6.0,
        gt=0,
        description="standard deviations of the last 50 losses above their mean that are a spike, if the "
        "loss is also 1.5 times the mean",
    )
    dead_after: int = Field(
        default=100,
        ge=1,
        description="steps of stage two in which an expert gets no token, or a router is collapsed, before "
        "that is told",
    )
    collapse_share: float = Field(
        default=0.95,
        gt=0.5,
        le=1,
        description="share of a router's first choices that, on one expert, is a collapse",
    )


class Recipe(Section):
    """A whole recipe, resolved: every key has its value."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, folder and seed of the run")
    base: BaseConfig = Field(description="the frozen language model")
    data: DataConfig = Field(description="domains and how they are read")
    mixer: MixerSection = Field(default_factory=MixerSection, description="experts and routers")
    stage1: StageConfig = Field(default_factory=StageConfig, description="stage one: experts, by domain")
    stage2: Stage2Config = Field(
        default_factory=Stage2Config, description="stage two: routers, without labels"
    )
    placement: PlacementConfig = Field(default_factory=PlacementConfig, description="where the experts live")
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig, description="the DeepSpeed engine")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="when the run is saved"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="what is measured at the end"
    )
    health: HealthConfig = Field(
        default_factory=HealthConfig, description="when a rank counts as lost, and steps that are not finite"
    )


def schema_json() -> str:
    """The JSON schema of a recipe, as indented text."""
    return json.dumps(Recipe.model_json_schema(), indent=2)
