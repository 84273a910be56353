"""LoraHub: searches whose best weights are known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from dsmixer.baselines.interface import Given
from dsmixer.baselines.lorahub import LoraHub, minimized
from dsmixer.baselines.rows import TrainingRows
from dsmixer.config.errors import UserError
from dsmixer.data.store import SCHEMA, TokenStore, record_batch
from dsmixer.model.inject import route_to


def test_the_search_reaches_the_least_of_a_bowl_with_its_penalty():
    middle, penalty = torch.tensor([0.9, -0.6]), 0.05

    def objective(weights):
        w = torch.tensor(weights)
        return float((w - middle).square().sum() + penalty * w.abs().mean())

    # where 2 (w - m) + penalty / 2 * sign(w) = 0
    best = middle - penalty / 4 * middle.sign()
    search = minimized(objective, 2, 40, 1.5, seed=0)
    assert search.start == pytest.approx(0.81 + 0.36)
    assert search.objective < objective(best.tolist()) + 0.05
    torch.testing.assert_close(torch.tensor(search.weights), best, rtol=0, atol=0.25)
    assert minimized(objective, 2, 40, 1.5, seed=0) == search


def test_the_search_stays_within_its_bounds():
    search = minimized(lambda w: -sum(w), 3, 40, 1.5, seed=0)
    assert all(-1.5 <= w <= 1.5 for w in search.weights)
    assert sum(search.weights) > 3.0


def test_weights_find_the_expert_that_wrote_the_examples(make_mixture):
    mixture = make_mixture(experts=["teacher", "noise"])
    model, names = mixture.model, mixture.expert_names
    rows = written_by(mixture, "teacher")
    fitted = LoraHub(num_examples=24)(Given(mixture, rows))
    found = fitted.found
    assert found["objective"] < found["start"] - 0.2
    told = LoraHub(num_examples=24, per_domain=True)(Given(mixture, rows))
    assert told.found == {"teacher": found} and told.told == {"teacher"}
    assert found["weights"]["teacher"] == pytest.approx(1.0, abs=0.35)
    assert abs(found["weights"]["noise"]) < 0.35
    assert fitted.num_trainable == len(names) and fitted.num_steps == 41
    assert not any(p.grad is not None for p in model.parameters())


@torch.no_grad()
def written_by(mixture, expert):
    """Rows drawn from the model with one expert: no model has a lower expected loss on them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (24, 1), generator=generator)
    with route_to(mixture.model, expert):
        for _ in range(20):
            p = torch.softmax(mixture.model(ids).logits[:, -1], dim=1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return rows_of(ids.tolist(), expert)


def rows_of(ids, expert):
    table = pa.Table.from_batches([record_batch(ids, [1] * len(ids))], SCHEMA)
    zeros = np.zeros(len(ids), dtype=np.int64)
    return TrainingRows(TokenStore(table, zeros, [""] * len(ids), "drawn"), (expert,), 0)


def test_experts_of_unlike_ranks_are_refused(make_mixture, rows):
    with pytest.raises(UserError, match="ranks 2, 4, 4"):
        LoraHub(steps=1)(Given(make_mixture(ranks={"sums": 2}), rows))
