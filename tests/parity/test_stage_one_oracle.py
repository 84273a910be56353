"""Stage one against separate PEFT LoRA trainings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.cases import names
from support.comparing import WEIGHTS, moved_share, relative
from support.launching import TIMEOUT_SECONDS
from support.oracles import PeftExperts

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


@pytest.mark.parametrize("name", names("hard_oracle"))
def test_stage_one_equals_one_peft_training_a_domain_step_by_step(runs: Any, name: str) -> None:
    """Losses, gradient norms and weights after every step, on two ranks with accumulation and packing; the
    encoder and the decoder of T5, whose rows are not packed, by its own loss.

    The domains have unequal numbers of target tokens, clipping is at work on some experts of a step and
    not on others, and there are steps without one of the domains.
    """
    run = runs[name]
    recipe, overrides = runs.recipe(name)
    torch.set_num_threads(1)
    peft = PeftExperts(recipe, overrides, runs.kind(name))
    assert peft.config.clip is not None
    losses, grad_norms, apart = [], [], []
    clipped = free = absent = uneven = 0
    start = before = {key: t for key, t in runs.start(name).items() if ".bank." in key}
    for step in range(len(peft.steps)):
        loss, norms, targets = peft.run_step(step)
        losses.append(loss)
        grad_norms.append(sum(norm**2 for norm in norms.values()) ** 0.5)
        clipped += sum(norm > peft.config.clip for norm in norms.values())
        free += sum(norm <= peft.config.clip for norm in norms.values())
        absent += 0 in targets
        uneven += len({t for t in targets if t}) > 1
        ours, theirs = run.tensors(1, step=step + 1), peft.weights(start)
        for e, count in enumerate(targets):
            if count == 0:
                assert all(torch.equal(ours[key][e], before[key][e]) for key in ours), "it was absent"
        apart.append(moved_share(ours, theirs, start))
        before = ours
    loss_apart = relative(run.column("loss"), torch.tensor(losses, dtype=torch.float64))
    norm_apart = relative(run.column("grad_norm"), torch.tensor(grad_norms, dtype=torch.float64))
    print(f"{name}: loss {loss_apart:.1e} grad_norm {norm_apart:.1e} weights {max(apart):.1e}")
    print(f"{name}: {absent} steps without a domain of {len(losses)}; {clipped} updates clipped, {free} not")
    assert absent and clipped and free and uneven
    assert loss_apart < 1e-5 and norm_apart < 1e-4 and max(apart) < WEIGHTS
