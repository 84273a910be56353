"""What a placement plan starts from: model, pool, cluster and training shape, as plain numbers.

Shape letters: D input width of a projection, O its output width, E experts, R LoRA rank (padded), K experts a
token, W ranks, n tokens of a rank's micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dsmixer.placement.owners import Slots

MODES = ("replicate", "weights", "tokens")
ZERO_STAGES = {"replicate": (0, 1, 2), "weights": (3,), "tokens": (1, 2, 3)}
"""The ZeRO stages that go with each mode."""

FLOAT32 = 4
EIGHT_BIT = 1 + 4 / 256
"""Bytes of a moment in 8 bits, with one float32 scale a block of 256."""

RANK_MULTIPLE = 8
"""To which the stacked banks pad the rank, as ``experts.bank`` does."""

SCALE_BYTES = {False: 4 / 64, True: 1 / 64 + 4 / (64 * 256)}
"""Bytes of scales for a weight in 4 bits, as bitsandbytes stores them: one scale a block of 64 weights, in
float32 or, quantised twice, in 8 bits with a float32 scale for 256 of them."""


@dataclass(frozen=True)
class Projection:
    """A projection that carries a mixer. Those of equal ``block`` read the same input.

    ``kept``: whether the base keeps that input for the backward pass anyway, as attention does what o reads.
    """

    in_features: int
    out_features: int
    block: str
    kept: bool = False


@dataclass(frozen=True)
class StateSpaceShape:
    """What the activations of a state-space layer follow from.

    Attributes:
        inner: I, width of what the scan runs over.
        state: N, numbers of state a channel.
        selected: width of the time step's low rank with B and C, as ``x_proj`` makes them; 0 in Mamba-2.
        channels: those of the convolution.
        heads: of Mamba-2; 0 in Mamba, where each channel has its own decay.
        chunk: Q, positions that Mamba-2 takes at once.
        fused: whether the kernels of mamba_ssm and causal_conv1d are there.
    """

    inner: int
    state: int
    selected: int
    channels: int
    heads: int = 0
    chunk: int = 0
    fused: bool = False


@dataclass(frozen=True)
class EncoderShape:
    """What an encoder-decoder model has beside its decoder's layers.

    Attributes:
        layers: number of encoder layers.
        mlp_kept: how often the feed-forward part of a layer, on both sides, keeps its inner width.
        dropout: whether the base drops activations itself in training.
    """

    layers: int
    mlp_kept: int
    dropout: bool = False


@dataclass(frozen=True)
class LayerShape:
    """What the activations of a decoder follow from.

    Attributes:
        hidden: width of the residual stream.
        mlp: inner width of the feed-forward part.
        gated: whether that part multiplies two branches, as SwiGLU does.
        query: width of all query heads together.
        key_value: width of all key heads together, as of all value heads.
        heads: query heads.
        layers: number of decoder layers.
        vocabulary: number of tokens the model knows.
        eager: whether attention keeps its scores, ``heads · S²`` a row.
        wide_residual: whether the residual stream is in float32 whatever the base is in.
        wide_logits: whether the logits are.
        state_space: of layers that have a state-space mixer in place of attention and feed-forward part.
        encoder: of a model whose decoder attends to what an encoder has read.
    """

    hidden: int
    mlp: int
    gated: bool
    query: int
    key_value: int
    heads: int
    layers: int
    vocabulary: int
    eager: bool = False
    wide_residual: bool = False
    wide_logits: bool = False
    state_space: StateSpaceShape | None = None
    encoder: EncoderShape | None = None


@dataclass(frozen=True)
class ModelShape:
    """A base model and where its mixers go.

    Attributes:
        parameters: weights of a frozen parameter, and how many parameters have that many.
        quantizable: the same of the linear layers that a 4-bit loading packs (all but the output head).
        projections: those with a mixer.
        layer: for the activations.
    """

    parameters: tuple[tuple[int, int], ...]
    quantizable: tuple[tuple[int, int], ...]
    projections: tuple[Projection, ...]
    layer: LayerShape

    @property
    def num_weights(self) -> int:
        """Weights of the base."""
        return sum(numel * count for numel, count in self.parameters)

    @property
    def width(self) -> int:
        """Σ (D + O) over the projections with a mixer."""
        return sum(p.in_features + p.out_features for p in self.projections)

    def router_widths(self, router: str) -> list[int]:
        """D of each router, for ``per_projection`` or ``per_block``."""
        if router == "per_projection":
            return [p.in_features for p in self.projections]
        return list({p.block: p.in_features for p in self.projections}.values())


def parameter_sizes(numels: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Sizes as ``ModelShape.parameters`` holds them."""
    return tuple(sorted(Counter(numels).items()))


@dataclass(frozen=True)
class Pool:
    """The experts.

    Attributes:
        ranks: LoRA rank of each.
        tokens: training tokens of each in stage one; only their proportions count.
        names: of each; used where owners are shown.
        router: ``per_projection`` or ``per_block``.
    """

    ranks: tuple[int, ...]
    tokens: tuple[float, ...]
    names: tuple[str, ...] = ()
    router: str = "per_projection"

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """R as the stacked bank has it."""
        return -(-max(self.ranks) // RANK_MULTIPLE) * RANK_MULTIPLE

    def name(self, expert: int) -> str:
        """What to call an expert."""
        return self.names[expert] if self.names else str(expert)


@dataclass(frozen=True)
class Cluster:
    """The ranks.

    Attributes:
        world_size: W.
        ranks_per_node: that share a machine.
        device_memory: bytes of a rank's device; None: not known.
        link_speed: bytes a second that a rank sends inside its node; None: not known.
        node_link_speed: bytes a second that a rank sends to another node; None: not known.
    """

    world_size: int
    ranks_per_node: int = 8
    device_memory: int | None = None
    link_speed: float | None = None
    node_link_speed: float | None = None


@dataclass(frozen=True)
class StageShape:
    """One stage of training on one rank.

    Attributes:
        name: ``stage1`` or ``stage2``.
        rows: of a micro-batch.
        max_length: S, positions of a row.
        accumulation: micro-batches a step.
        trains_experts: whether the banks get gradients.
        trains_routers: whether the routers do.
        keeps_origin: whether the stage-one values are kept for the preserve term.
        top_k: K; None in stage one, where no router is asked.
        every_expert: whether all experts answer every token (``soft``, ``hard_soft``, ``top_p``).
        eight_bit: whether the experts' moments are kept in 8 bits.
        paged: whether moments are in memory that moves to the host.
        origin_on_host: whether the stage-one values are kept there.
        outputs_apart: whether a loss reads what each expert of a token puts out.
    """

    name: str
    rows: int
    max_length: int
    accumulation: int
    trains_experts: bool
    trains_routers: bool
    keeps_origin: bool = False
    top_k: int | None = None
    every_expert: bool = False
    eight_bit: bool = False
    paged: bool = False
    origin_on_host: bool = False
    outputs_apart: bool = False

    @property
    def tokens(self) -> int:
        """n, with full rows."""
        return self.rows * self.max_length

    def named(self, num_experts: int) -> int | None:
        """Experts that a token's router names; None in stage one, where tokens stay with their expert."""
        if self.top_k is None or self.every_expert:
            return num_experts if self.every_expert else None
        return min(self.top_k, num_experts)


@dataclass(frozen=True)
class EngineSizes:
    """Sizes, in elements, that DeepSpeed's buffers follow from; the defaults are deepspeed 0.19.8's."""

    reduce_bucket: int = 2**25
    plain_bucket: int = 500_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    sub_group: int = 1_000_000_000

    @classmethod
    def from_config(cls, zero_block: Mapping[str, object]) -> EngineSizes:
        """From the ``zero_optimization`` block that the engine gets."""
        names = {
            "reduce_bucket": "reduce_bucket_size",
            "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance",
            "prefetch": "stage3_prefetch_bucket_size",
            "persistence": "stage3_param_persistence_threshold",
            "sub_group": "sub_group_size",
        }
        given = {own: zero_block.get(theirs) for own, theirs in names.items()}
        return cls(**{own: int(value) for own, value in given.items() if isinstance(value, int | float)})


@dataclass(frozen=True)
class PlanRequest:
    """Everything a plan is made from.

    Attributes:
        model: the base and its projections.
        pool: the experts.
        cluster: the ranks.
        stages: those that run, in order.
        base_bytes: of a base weight, and of an activation: 2 or 4.
        four_bit: whether the base's linear layers are stored in 4 bits.
        double_quantization: whether their scales are stored in 8 bits then.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        dropout: whether experts' inputs are dropped.
        engine: of DeepSpeed's buffers.
        mode: ``auto`` or the one asked for.
        zero_stage: None or the one asked for.
        expert_parallel_size: None or the one asked for.
        slots: in which stage one draws the experts' data; None: of the pool's tokens, one a rank.
        offload: which of ``optimizer`` and ``parameters`` DeepSpeed keeps on the host.
    """

    model: ModelShape
    pool: Pool
    cluster: Cluster
    stages: tuple[StageShape, ...]
    base_bytes: int = 2
    four_bit: bool = False
    double_quantization: bool = True
    checkpointing: bool = False
    dropout: bool = False
    engine: EngineSizes = field(default_factory=EngineSizes)
    mode: str = "auto"
    zero_stage: int | None = None
    expert_parallel_size: int | None = None
    slots: Slots | None = None
    offload: frozenset[str] = frozenset()

    @property
    def stored_sizes(self) -> tuple[tuple[int, int], ...]:
        """As ``model.parameters``, in elements of the base's type: one holds several 4-bit weights."""
        sizes = Counter(dict(self.model.parameters))
        if self.four_bit:
            in_each = 2 * self.base_bytes
            for numel, count in self.model.quantizable:
                sizes[numel] -= count
                sizes[-(-numel // in_each)] += count
        return tuple(sorted((+sizes).items()))

    @property
    def dispatches(self) -> list[int]:
        """D of each dispatch of stage two: one a router, which projections may share."""
        return self.model.router_widths(self.pool.router)
