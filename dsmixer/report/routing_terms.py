"""The routing specialisation loss of a run, in its two terms (arXiv 2507.00029, eq. 5 and figure 6).

``metrics.jsonl`` holds the loss, the routers' mean token entropy and both terms. Of a run that did not log
the terms, the entropy term follows from that entropy, the settings and the ramp; the balance term is what is
left.
"""

from __future__ import annotations

import numpy as np

from dsmixer.report.run_folder import RunFolder

TOTAL, BALANCE, ENTROPY = "routing loss", "balance term, α Σ p̄ f̄", "entropy term, σ λ H"
BALANCE_KEY, ENTROPY_KEY = "rsl_balance", "rsl_entropy"  # in metrics.jsonl
SIGNS = {"specialize": 1.0, "paper_eq5": -1.0}

Series = tuple[np.ndarray, np.ndarray]


def routing_terms(run: RunFolder) -> dict[str, Series]:
    """Steps and values of the loss and of each term, by label; empty where they can't be told apart.

    They can't where another loss than RSL was trained with. Of a run that did not log them, they can't either
    where it has not ended and does not say at how many steps it would, since the terms' weights rise with the
    share of steps done.
    """
    logged = {BALANCE: run.series(2, BALANCE_KEY), ENTROPY: run.series(2, ENTROPY_KEY)}
    if np.isfinite(logged[BALANCE][1]).any():
        return {TOTAL: run.series(2, "rsl"), **logged}
    if run.setting("stage2.routing_loss") not in (None, "lora_mixer"):
        return {}
    settings = [run.setting(f"stage2.rsl.{key}") for key in ("entropy_weight", "entropy", "ramp")]
    num_steps = _num_steps(run)
    weight, kind, share = settings
    if not isinstance(weight, int | float) or not isinstance(share, int | float) or kind not in SIGNS:
        return {}
    if num_steps is None:
        return {}
    steps, total = run.series(2, "rsl")
    ramp = np.minimum(1.0, steps / (share * num_steps)) if share * num_steps > 0 else np.ones_like(steps)
    entropy = ramp * SIGNS[kind] * weight * run.series(2, "routing_entropy")[1]
    found = {TOTAL: (steps, total), BALANCE: (steps, total - entropy), ENTROPY: (steps, entropy)}
    return found if np.isfinite(found[BALANCE][1]).any() else {}


def _num_steps(run: RunFolder) -> int | None:
    """Of stage two: the last one of a run that has ended, else what the settings say."""
    rows, steps = run.metrics.get(2), run.setting("stage2.max_steps")
    published = run.path / "mixture" / "mixer_config.json"  # at the end, before the report
    if rows and (run.evaluation or published.is_file()):
        return int(rows[-1]["step"])
    return steps if isinstance(steps, int) else None
