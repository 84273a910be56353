"""The routing loss taken apart: terms that were put together by hand come out as they went in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsmixer.config.yaml_text import dump_yaml
from dsmixer.report.curves import balance_figures
from dsmixer.report.routing_terms import BALANCE, ENTROPY, TOTAL, routing_terms
from dsmixer.report.run_folder import read_run

STEPS, RAMP, LAMBDA = 20, 0.5, 0.05
BALANCES = [0.03 + 0.01 / step for step in range(1, STEPS + 1)]  # alpha * sum of p f, fully risen
ENTROPIES = [1.8 - 0.05 * step for step in range(1, STEPS + 1)]


def run_folder(folder, *, sign=1.0, finished=True, **stage2):
    """A run of stage two whose loss is ramp * (balance + sign * lambda * entropy)."""
    kind = "specialize" if sign > 0 else "paper_eq5"
    rsl = {"alpha": 0.1, "entropy_weight": LAMBDA, "entropy": kind, "ramp": RAMP}
    (folder / "config.yaml").write_text(dump_yaml({"run": {"name": "x"}, "stage2": {"rsl": rsl, **stage2}}))
    rows = []
    for step, (balance, entropy) in enumerate(zip(BALANCES, ENTROPIES, strict=True), 1):
        ramp = min(1.0, step / (RAMP * STEPS))
        loss = ramp * (balance + sign * LAMBDA * entropy)
        rows.append({"stage": 2, "step": step, "rsl": loss, "routing_entropy": entropy})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if finished:
        (folder / "mixture").mkdir()
        (folder / "mixture" / "mixer_config.json").write_text("{}")
    return read_run(folder)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_both_terms_come_out_with_their_ramp_and_sign(tmp_path, sign):
    terms = routing_terms(run_folder(tmp_path, sign=sign))
    ramp = np.minimum(1.0, np.arange(1, STEPS + 1) / 10)
    assert list(terms) == [TOTAL, BALANCE, ENTROPY]
    assert terms[BALANCE][1] == pytest.approx(ramp * np.array(BALANCES))
    assert terms[ENTROPY][1] == pytest.approx(sign * 0.05 * ramp * np.array(ENTROPIES))
    assert terms[TOTAL][1] == pytest.approx(terms[BALANCE][1] + terms[ENTROPY][1])


def test_a_run_that_has_not_ended_needs_its_number_of_steps(tmp_path):
    run = run_folder(tmp_path, finished=False)
    assert routing_terms(run) == {}
    assert next(title for title, _ in balance_figures(run)) == "Routing loss"
    known = run_folder(tmp_path, finished=False, max_steps=STEPS)
    assert routing_terms(known)[BALANCE][1][-1] == pytest.approx(BALANCES[-1])


@pytest.mark.parametrize("loss", ["switch", [{"loss": "rsl"}]])
def test_another_loss_is_shown_whole(tmp_path, loss):
    run = run_folder(tmp_path, routing_loss=loss)
    assert routing_terms(run) == {}
    assert next(title for title, _ in balance_figures(run)) == "Routing loss"
