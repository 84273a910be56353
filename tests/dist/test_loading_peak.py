"""Host memory while a sharded checkpoint is loaded by two ranks, against its size and the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loading_ranks
from support.launching import launch
from support.tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from dsmixer.model.shape import model_shape
from dsmixer.placement.memory import Layout, base_bytes, load_bytes
from dsmixer.placement.owners import Owners
from dsmixer.placement.request import Cluster, EngineSizes, PlanRequest, Pool

RANKS = 2
PERSISTENCE = 200
"""Of ``plan_bytes_ranks.ds_config``: elements up to which ZeRO-3 leaves a weight whole on every rank."""
SPARE = 40 * 2**20
"""What the libraries take beside the weights: work of the packing, names, read-ahead."""
pytestmark = pytest.mark.timeout(900)  # the launch counts for the first test


def config(layers: int, hidden: int) -> LlamaConfig:
    """A small vocabulary, so that most of the weights can be packed."""
    return LlamaConfig(
        vocab_size=4 * hidden,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )


LARGE, SMALL = config(11, 1024), config(2, 256)
"""286 MiB in bfloat16, far more than its largest weight; and one for engines of every stage."""


def write(folder: Path, model: LlamaConfig, shard: str) -> Path:
    AutoModelForCausalLM.from_config(model, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size=shard
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights in shards of 40 MB."""
    return write(tmp_path_factory.mktemp("large"), LARGE, "40MB")


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("peak")
    small = write(folder / "small", SMALL, "1GB")
    with pytest.MonkeyPatch.context() as patch:
        # what is freed goes back to the system at once: what is seen is what is held
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
        script = Path(loading_ranks.__file__)
        launch(script, [str(checkpoint), str(small), str(folder)], ranks=RANKS).check()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


def planned(
    model: LlamaConfig, quantization: str, stage: int, *, double: bool = True, persistence: int = 100_000
) -> tuple[int, int]:
    """Bytes of the base on a rank, and at most while it is loaded, by the plan."""
    with torch.device("meta"):
        shape = model_shape(AutoModelForCausalLM.from_config(model), ["q"])
    request = PlanRequest(
        model=shape,
        pool=Pool((8,), (1.0,)),
        cluster=Cluster(RANKS),
        stages=(),
        four_bit=quantization != "none",
        double_quantization=double,
        engine=EngineSizes(persistence=persistence),
    )
    layout = Layout("weights" if stage == 3 else "replicate", stage, Owners((((0, 1.0),),), (1.0,)))
    return base_bytes(request, layout), load_bytes(request, layout)


@pytest.mark.parametrize("quantization", loading_ranks.LARGE)
def test_no_rank_takes_more_than_the_plan_says_while_it_loads_under_zero3(
    measured: list[dict[str, Any]], checkpoint: Path, quantization: str
) -> None:
    """Not the whole unquantised base, and in 4 bits never an unquantised copy of it."""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert len(list(checkpoint.glob("*.safetensors"))) > 5
    held, loading = planned(LARGE, quantization, 3)
    for rank, found in enumerate(measured):
        case = found["large"][quantization]
        print(
            f"{quantization}, ZeRO 3, rank {rank}, checkpoint {size / 2**20:.0f} MiB: at most "
            f"{case['peak'] / 2**20:.0f} MiB while loading (plan {loading / 2**20:.0f}), then "
            f"{case['after'] / 2**20:.0f} (plan {held / 2**20:.0f}); "
            f"{case['mapped'] / 2**20:.0f} MiB of files mapped at most"
        )
        assert case["stored"] == pytest.approx(held, rel=0.05)
        assert case["peak"] < loading + SPARE < 0.75 * size


@pytest.mark.parametrize("case", loading_ranks.SMALL)
def test_the_plan_tells_what_a_four_bit_base_keeps_on_a_rank(
    measured: list[dict[str, Any]], case: tuple[str, bool, int]
) -> None:
    """With and without double quantisation, which are 4 % apart, inside an engine of every ZeRO stage."""
    quantization, double, stage = case
    held, _ = planned(SMALL, quantization, stage, double=double, persistence=PERSISTENCE)
    for found in measured:
        seen = found["small"][loading_ranks.SMALL.index(case)]
        print(
            f"{quantization}, double {double}, ZeRO {stage}: {seen / held:.3f} of the plan's {held:,} bytes"
        )
        assert seen == pytest.approx(held, rel=0.02)


def test_the_plan_tells_scales_of_8_and_of_32_bits_apart() -> None:
    """By more than the test above leaves; and ZeRO-3 on two ranks halves all but the scales."""
    double, single = (planned(SMALL, "nf4", 0, double=d)[0] for d in (True, False))
    cut, _ = planned(SMALL, "nf4", 3, persistence=PERSISTENCE)
    unpacked, _ = planned(SMALL, "none", 0)
    assert 1.03 * double < single < unpacked / 2 and cut < 0.55 * double
