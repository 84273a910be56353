"""Runs that keep their state elsewhere or in fewer bits, beside those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from support.comparing import distance, moved_share, relative, same_bits
from support.launching import TIMEOUT_SECONDS

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_deepspeed_keeps_on_the_host_changes_nothing(runs: Any, zero: int) -> None:
    """Optimizer under ZeRO 1 and 2; optimizer and parameters under ZeRO 3."""
    apart = distance(runs[f"offload_z{zero}"], runs[f"w2z{zero}"], runs.start(f"w2z{zero}"))
    print(f"offload z{zero}: {apart}")
    assert apart.within(), str(apart)


@pytest.mark.parametrize("name", ["eight_bit_z2", "eight_bit_z3", "eight_bit_spread"])
def test_eight_bit_moments_train_nearly_as_float32_ones(runs: Any, name: str) -> None:
    """Also with experts apart, on four ranks in the long form; the moments really are rounded, those of the
    routers are not."""
    run, exact = runs[name], runs["w2z2"]
    apart = relative(run.column("task_loss"), exact.column("task_loss"))
    trained = moved_share(run.tensors(1), exact.tensors(1), runs.start("w2z2"))
    print(f"{name}: losses differ by {apart:.1e}, stage-one weights by {trained:.3f} of the distance moved")
    assert apart < 1e-2 and 0 < trained < 0.3
    table = torch.cat((create_dynamic_map(signed=True), torch.tensor([-1.0])))
    for key, moment in run.tensors(2, "exp_avg").items():
        if ".bank." in key:  # of the first expert the first block is whole in any of these layouts
            block = moment[0].flatten()[:256]
            places = block / block.abs().max().clamp_min(1e-30)
            assert bool(((places[:, None] - table).abs().amin(1) < 1e-6).all()), key


def test_a_stopped_run_with_eight_bit_moments_goes_on_bit_for_bit(runs: Any) -> None:
    same_bits(runs["eight_bit_stopped_z2"], runs["eight_bit_z2"])
