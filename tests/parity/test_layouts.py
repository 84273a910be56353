"""The same mathematics whatever the ZeRO stage, the ranks, the packing and the accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.cases import FEED_FORWARD, LONG, ROUTINGS
from support.comparing import WEIGHTS, distance, moved_share, relative, same_bits
from support.launching import TIMEOUT_SECONDS

# the first test that asks for a run waits for the whole launch, on a busy machine for minutes
pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)

LAYOUTS = [f"w{w}z{z}" for w in ((1, 2, 4) if LONG else (1, 2)) for z in range(4)]
GPT2 = [f"gpt2_{layout}" for layout in LAYOUTS if LONG]
OTHERS = [f"{routing}_w2z{z}" for routing in ROUTINGS for z in (2, 3) if LONG]


def _reference(name: str) -> str:
    return f"{name[: -len('w0z0')]}w1z0"


@pytest.mark.parametrize("name", [n for n in LAYOUTS + GPT2 + OTHERS if n != _reference(n)])
def test_zero_stage_and_world_size_change_neither_losses_nor_norms_nor_weights(runs: Any, name: str) -> None:
    """Both stages, clipping at work, wide routers."""
    reference = runs[_reference(name)]
    apart = distance(runs[name], reference, runs.start(name))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)


@pytest.mark.parametrize("name", [f"mlp_{layout.name}" for layout in FEED_FORWARD[1:]])
def test_experts_on_the_feed_forward_part_train_the_same_wherever_they_are(runs: Any, name: str) -> None:
    first = f"mlp_{FEED_FORWARD[0].name}"
    apart = distance(runs[name], runs[first], runs.start(first))
    print(f"{name}: {apart}")
    assert apart.within(), str(apart)
    assert any(".gate_proj." in key for key in runs[name].tensors(2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_holds_the_weights_of_the_live_model(runs: Any, name: str) -> None:
    run = runs[name]
    live, saved = run.live(), run.tensors(2)
    assert live.keys() == saved.keys()
    assert all(torch.equal(live[key], tensor) for key, tensor in saved.items())


def test_the_layout_runs_clip_and_their_routers_are_wide(runs: Any) -> None:
    """Otherwise the tests above would prove less than they say."""
    reference = runs["w1z0"]
    assert bool((reference.column("grad_norm") > 0.5 * 4**0.5).any()), "with four units, one was clipped"
    entropy = reference.column("routing_entropy", 2)
    assert bool((entropy < 0.95 * torch.log(torch.tensor(3.0))).all()), entropy


@pytest.mark.parametrize("fault", ["no_world", "local_counts"])
def test_a_wrong_gradient_scale_is_seen_by_this_comparison(runs: Any, fault: str) -> None:
    """The loop without the factor W, and with the target tokens of a rank instead of the step's."""
    apart = distance(runs[f"fault_{fault}"], runs["w1z0"], runs.start("w1z0"))
    print(f"{fault}: {apart}")
    assert not apart.within()
    assert apart.grad_norm > 0.01


def test_packed_rows_train_as_one_example_a_row_does(runs: Any) -> None:
    """One step over all examples in each stage: losses, clipped gradients (first moments) and weights."""
    packed, unpacked = runs["packed"], runs["unpacked"]
    assert [(row["stage"], row["step"]) for row in packed.rows] == [(1, 1), (2, 1)]
    assert packed.column("tokens").equal(unpacked.column("tokens"))
    start = runs.start("packed")
    apart = distance(packed, unpacked, start)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in start.items()}
    gradients = max(
        moved_share(packed.tensors(s, "exp_avg"), unpacked.tensors(s, "exp_avg"), zeros) for s in (1, 2)
    )
    print(f"packed: {apart} gradients {gradients:.1e}")
    assert apart.within() and gradients < 1e-4


def test_accumulation_of_four_rows_one_by_one_equals_one_batch_of_four(runs: Any) -> None:
    """Rows of unequal lengths, so that a mean of means would differ; both stages."""
    apart = distance(runs["four_times_one"], runs["one_times_four"], runs.start("one_times_four"))
    print(f"accumulation: {apart}")
    assert apart.within()


@pytest.mark.parametrize(
    ("checkpointed", "plain"),
    [("checkpointed_z0", "w2z0"), ("checkpointed_z3", "w2z3"), ("checkpointed_dropout_z2", "dropout_z2")],
)
def test_activation_checkpointing_changes_no_figure_of_any_step(
    runs: Any, checkpointed: str, plain: str
) -> None:
    """Every column of the metrics, routing statistics among them, and all that is saved; dropout included."""
    ours, theirs = runs[checkpointed], runs[plain]
    assert all(row["routing_entropy"] > 0 for row in theirs.rows if row["stage"] == 2)
    same_bits(ours, theirs)


def test_dropout_is_at_work_in_the_run_that_checkpointing_repeats(runs: Any) -> None:
    assert relative(runs["dropout_z2"].column("loss"), runs["w2z2"].column("loss")) > 1e-3


@pytest.mark.parametrize("zero", range(4) if LONG else (2, 3))
def test_one_command_for_both_stages_equals_a_command_for_each(runs: Any, zero: int) -> None:
    same_bits(runs[f"two_commands_z{zero}"], runs[f"w2z{zero}"])


@pytest.mark.parametrize("zero", range(4) if LONG else (3,))
def test_a_run_stopped_by_a_signal_in_each_stage_ends_bit_for_bit_as_without(runs: Any, zero: int) -> None:
    same_bits(runs[f"stopped_z{zero}"], runs[f"w2z{zero}"])


@pytest.mark.parametrize("zero", range(4) if LONG else (2, 3))
def test_a_bfloat16_base_stays_as_it_was_while_float32_experts_train(runs: Any, zero: int) -> None:
    """Frozen weights equal those on disk in every bit; the losses are those of float32 but for rounding."""
    run = runs[f"bf16_z{zero}"]
    seen = run.observed()
    assert seen["frozen_dtypes"] == ["torch.bfloat16"] and seen["trained_dtypes"] == ["torch.float32"]
    assert len(seen["frozen"]) == 21 and seen["frozen_changed"] == []
    apart = relative(run.column("task_loss"), runs[f"w2z{zero}"].column("task_loss"))
    trained = moved_share(run.tensors(1), runs[f"w2z{zero}"].tensors(1), runs.start("w2z2"))
    print(f"bf16 z{zero}: losses differ by {apart:.1e}, weights by {trained:.2f} of the distance moved")
    assert apart < 0.02
    assert 0 < trained < 1 and WEIGHTS < 1
