"""Which checkpoints a mixture takes, and that its weights come out as they went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.partitions import FakePool, FakeRanks, save_fake
from torch import nn

from dsmixer.checkpoint.restore import SavedCheckpoint
from dsmixer.config.errors import UserError
from dsmixer.model.inject import Mixture, attach_mixers
from dsmixer.model.mixer_config import MixerConfig
from dsmixer.placement.exchange import LocalExchange, Placement
from dsmixer.placement.layout import ExpertLayout
from dsmixer.training.saving import check_fits, load_weights


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 6, bias=False)


def mixture_of(experts: list[str], rank: int, placement: Placement | None = None) -> Mixture:
    model = nn.Module()
    model.add_module("layers", nn.ModuleList([nn.Module()]))
    model.layers[0].add_module("self_attn", Attention())
    config = MixerConfig(targets=["q_proj"], experts=experts, rank=rank, alpha=8.0)
    return attach_mixers(model, config, placement)


class RealPool(FakePool):
    """The numbers of a fake pool under the names and shapes of a mixture."""

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        prefix = "layers.0.self_attn.q_proj"
        shapes = {
            f"{prefix}.bank.lora_A": (8, 4),
            f"{prefix}.bank.lora_B": (8, 6),
            f"{prefix}.router.weight": (4,),
        }
        sizes = {name: (self.num_experts, *shape) for name, shape in shapes.items()}
        start = torch.arange(self.num_experts * 84, dtype=torch.float32) + len(kind)
        return {
            name: start[: torch.Size(shape).numel()].view(shape) + i
            for i, (name, shape) in enumerate(sizes.items())
        }


POOL = RealPool(3, ((8, 4),))


@pytest.fixture
def saved(tmp_path: Path) -> SavedCheckpoint:
    return SavedCheckpoint(save_fake(tmp_path, POOL, FakeRanks(((0, 1), (2, 1)), 2, (0.3,) * 8), 1))


def named(mixture: Mixture) -> list[tuple[str, nn.Parameter]]:
    return [*mixture.expert_parameters(), *mixture.router_parameters()]


@pytest.mark.parametrize("local", [(0, 1, 2), (2, 0)])
def test_weights_come_into_the_banks_of_a_rank_whichever_experts_it_holds(
    saved: SavedCheckpoint, local: tuple[int, ...]
) -> None:
    owned = (local,) if len(local) == 3 else (local, (1,))
    mixture = mixture_of(POOL.names, 8, Placement(ExpertLayout(owned), LocalExchange()))
    check_fits(saved, mixture, named(mixture))
    load_weights(mixture, saved)
    whole = POOL.whole("weights")
    for name, parameter in mixture.expert_parameters():
        assert torch.equal(parameter, whole[name][list(local)]), name
    for name, parameter in mixture.router_parameters():
        assert torch.equal(parameter, whole[name]), name


@pytest.mark.parametrize(
    ("experts", "rank", "message"),
    [
        (["expert0", "expert2", "expert1"], 8, "has the experts expert0, expert1, expert2"),
        (["expert0", "expert1"], 8, "has the experts"),
        (["expert0", "expert1", "expert2"], 7, "have the ranks"),
        (["expert0", "expert1", "expert2"], 16, "have the ranks"),
    ],
)
def test_another_pool_is_refused(saved: SavedCheckpoint, experts: list[str], rank: int, message: str) -> None:
    """A rank that is hidden by the rounding of a bank's height, too: new rows of zeros would never train."""
    mixture = mixture_of(experts, rank)
    with pytest.raises(UserError, match=message):
        check_fits(saved, mixture, named(mixture))


def test_another_set_of_trained_weights_is_refused(saved: SavedCheckpoint) -> None:
    mixture = mixture_of(POOL.names, 8)
    with pytest.raises(UserError, match=r"router.weight is \[3, 4\] in it and not trained in this recipe"):
        check_fits(saved, mixture, list(mixture.expert_parameters()))
