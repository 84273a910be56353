"""Losses of other methods in real runs: the same in every layout, and after a resume; AESL's by autograd."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from support.comparing import WEIGHTS, distance, moved_share, same_bits
from support.launching import TIMEOUT_SECONDS
from support.oracles import PlainStageTwo

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


def test_losses_of_every_kind_are_the_same_on_one_rank_and_spread_over_two(runs: Any) -> None:
    """With the usage of the step before, so that accumulation and ranks do not enter."""
    one, spread = runs["terms_one"], runs["terms_spread"]
    apart = distance(spread, one, runs.start("terms_one"))
    print(f"terms_spread: {apart}")
    assert apart.within(), str(apart)
    assert not bool((one.column("rsl", 2) == runs["w1z1"].column("rsl", 2)).any()), "another loss than RSL"


def test_the_usages_of_all_terms_are_kept_in_a_checkpoint(runs: Any) -> None:
    same_bits(runs["terms_stopped"], runs["terms_spread"])


class AeslStageTwo(PlainStageTwo):
    """Stage two with ``alpha E sum_i p_i f_i + beta L_o + gamma L_v``, each mean of the step before."""

    ALPHA, BETA, GAMMA = 0.2, 0.5, 0.3

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.means = self.usage.clone()
        self.seen: dict[str, list[torch.Tensor]] = {}
        for path, mixer in self.mixture.mixers.items():
            mixer.register_forward_pre_hook(self._keep_input(path))

    def _keep_input(self, path: str) -> Any:
        return lambda module, given: self.seen.setdefault(path, []).append(given[0].flatten(0, 1))

    def _rsl(self, step: int, tokens: int) -> tuple[torch.Tensor, float]:
        ramp = min(1.0, (step + 1) / (self.config.rsl.ramp * len(self.steps)))
        losses, entropies, firsts, means = [], [], [], []
        for index, path in enumerate(self.mixture.routers):
            p_TE = torch.cat(self._logits[index]).softmax(1)
            balance = p_TE.shape[1] * (p_TE.mean(0) * self.usage[index]).sum()
            variance = -(p_TE - self.means[index]).square().sum(1).mean()
            chosen_TK = p_TE.topk(self.config.top_k, dim=1).indices
            along = self._along(path, chosen_TK)
            losses.append(self.ALPHA * balance + self.BETA * along + self.GAMMA * variance)
            entropies.append(-(p_TE * p_TE.log()).sum(1).mean().item())
            firsts.append(torch.nn.functional.one_hot(p_TE.argmax(1), p_TE.shape[1]).float().mean(0))
            means.append(p_TE.detach().mean(0))
        self.usage, self.means = torch.stack(firsts), torch.stack(means)
        self.seen.clear()
        return ramp * torch.stack(losses).mean(), sum(entropies) / len(entropies)

    def _along(self, path: str, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Mean over tokens of the squared projections of each chosen output on each other one."""
        x_TD, mixer = torch.cat(self.seen[path]), self.steps.loaded.recipe.mixer
        outs_E = [
            mixer.alpha / mixer.rank * (x_TD @ e[f"{path}.bank.lora_A"].T) @ e[f"{path}.bank.lora_B"]
            for e in self.experts
        ]
        outs_TEO = torch.stack(outs_E, dim=1)
        total = torch.zeros(len(x_TD))
        tokens = torch.arange(len(x_TD))
        for j, k in permutations(range(chosen_TK.shape[1]), 2):
            one, other = outs_TEO[tokens, chosen_TK[:, j]], outs_TEO[tokens, chosen_TK[:, k]]
            part = (one * other).sum(1) / ((other * other).sum(1) + 1e-6)
            total = total + (part[:, None] * other).square().sum(1)
        return total.mean()


def test_aesl_in_a_run_equals_autograd_of_its_formula_in_one_process(runs: Any) -> None:
    """Every figure and the weights after every step, experts trained too, on two ranks."""
    run = runs["aesl_oracle"]
    torch.set_num_threads(1)
    plain = AeslStageTwo(*runs.recipe("aesl_oracle"), run.tensors(1))
    start = plain.weights()
    apart: dict[str, float] = {}
    for step, row in enumerate(row for row in run.rows if row["stage"] == 2):
        for key, value in plain.run_step(step).items():
            if row[key] or value:
                apart[key] = max(apart.get(key, 0.0), abs(row[key] - value) / abs(value))
        share = moved_share(run.tensors(2, step=step + 1), plain.weights(), start)
        apart["weights"] = max(apart.get("weights", 0.0), share)
    print("aesl_oracle: " + " ".join(f"{key} {value:.1e}" for key, value in apart.items()))
    assert apart["task_loss"] < 1e-5 and apart["rsl"] < 1e-5 and apart["routing_entropy"] < 1e-5
    assert apart["grad_norm"] < 1e-4 and apart["preserve"] < 1e-3 and apart["weights"] < WEIGHTS


def test_aesl_is_the_same_in_one_micro_batch_and_in_four_on_each_of_two_ranks(runs: Any) -> None:
    apart = distance(runs["aesl_once"], runs["aesl_oracle"], runs.start("aesl_oracle"))
    print(f"aesl_once: {apart}")
    assert apart.within(), str(apart)
