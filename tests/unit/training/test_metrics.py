"""``metrics.jsonl`` and routing figures, against sums written out by hand and TensorBoard's own reader."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.faults import limit_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmixer.report.run_folder import METRICS_FILE, read_metrics
from dsmixer.routing.modes import Routing, modes
from dsmixer.routing.statistics import RouterOutput, RoutingStatistics
from dsmixer.training.metrics import MetricsLog, routing_metrics
from dsmixer.training.tensorboard import TensorBoardLog, load_by_domain, load_by_router

NUM_ROUTERS, NUM_EXPERTS, NUM_DOMAINS, NUM_TOKENS = 3, 4, 3, 50


def make_statistics(
    logits_MTE: torch.Tensor, domains_T: torch.Tensor, *, top_k: int = 2, num_domains: int = NUM_DOMAINS
) -> RoutingStatistics:
    """What routers with these logits record; the last ten tokens are padding."""
    num_routers, num_tokens, num_experts = logits_MTE.shape
    statistics = RoutingStatistics(num_routers, num_experts, num_domains)
    mask_T = (torch.arange(num_tokens) < num_tokens - 10).float()
    domains_T = torch.where(mask_T > 0, domains_T, -1)
    for router, logits_TE in enumerate(logits_MTE):
        p_TE = torch.softmax(logits_TE, 1)
        choice = modes["topk"](p_TE, Routing("topk", top_k=top_k))
        statistics.record(router, RouterOutput(logits_TE, p_TE, choice, mask_T), domains_T)
    return statistics


@pytest.fixture
def logits_MTE() -> torch.Tensor:
    return 2 * torch.randn(NUM_ROUTERS, NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def domains_T() -> torch.Tensor:
    return torch.arange(NUM_TOKENS) % NUM_DOMAINS


def test_routing_metrics_equal_sums_over_real_tokens_written_out_in_float64(logits_MTE, domains_T):
    metrics = routing_metrics(
        make_statistics(logits_MTE, domains_T),
        expert_names=["a", "b", "c", "d"],
        expert_of_domain=[2, 0, -1],
    )
    logits = logits_MTE[:, :-10].double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1).mean()
    load = np.zeros((NUM_ROUTERS, NUM_EXPERTS))
    own = []
    for router in range(NUM_ROUTERS):
        for token, row in enumerate(p[router]):
            best = np.argsort(-row)[:2]
            load[router, best] += NUM_EXPERTS * row[best] / row[best].sum() / len(p[router])
            if token % 3 < 2:
                own.append(best[0] == [2, 0][token % 3])
    assert metrics["routing_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["routing_entropy_bits"] == pytest.approx(entropy / math.log(2), rel=1e-5)
    assert metrics["entropy_limit"] == pytest.approx(math.log(4))
    assert metrics["load_variance"] == pytest.approx(load.var(axis=1).mean(), rel=1e-5)
    assert metrics["p_variance"] == pytest.approx(p.var(axis=1).mean(), rel=1e-4)
    assert metrics["load_max"] == pytest.approx(load.mean(0).max(), rel=1e-5)
    assert metrics["load_min"] == pytest.approx(load.mean(0).min(), rel=1e-5)
    assert metrics["own_expert_share"] == pytest.approx(np.mean(own), rel=1e-5)
    assert [metrics[f"load/{name}"] for name in "abcd"] == pytest.approx(load.mean(0).tolist(), rel=1e-5)


def test_even_routing_has_no_variance_and_the_largest_entropy():
    statistics = make_statistics(torch.zeros(2, 40, 8), torch.zeros(40, dtype=torch.long), top_k=8)
    metrics = routing_metrics(statistics)
    assert metrics["routing_entropy"] == pytest.approx(metrics["entropy_limit"], rel=1e-6)
    assert metrics["load_variance"] == pytest.approx(0, abs=1e-9)
    assert metrics["p_variance"] == pytest.approx(0, abs=1e-12)
    assert metrics["dead_experts"] == 0


def test_collapse_onto_one_expert_gives_variance_e_minus_one_and_counts_the_dead():
    logits_MTE = torch.zeros(2, 40, 8)
    logits_MTE[:, :, 3] = 50.0
    metrics = routing_metrics(make_statistics(logits_MTE, torch.zeros(40, dtype=torch.long), top_k=1))
    assert metrics["load_variance"] == pytest.approx(7, rel=1e-6)
    assert metrics["p_variance"] == pytest.approx(0, abs=1e-9), "each token says the same"
    assert metrics["dead_experts"] == 7
    assert metrics["load_max"] == pytest.approx(8)


def test_routers_that_saw_no_token_do_not_count(logits_MTE, domains_T):
    expected = routing_metrics(make_statistics(logits_MTE, domains_T))
    statistics = RoutingStatistics(NUM_ROUTERS + 2, NUM_EXPERTS, NUM_DOMAINS)
    statistics.buffer[1:-1] = make_statistics(logits_MTE, domains_T).buffer
    assert routing_metrics(statistics) == pytest.approx(expected, rel=1e-6)


def test_no_token_at_all_gives_no_figures():
    assert routing_metrics(RoutingStatistics(2, 4)) == {}


def test_names_of_many_experts_make_no_keys():
    statistics = make_statistics(torch.randn(1, 40, 33), torch.zeros(40, dtype=torch.long))
    metrics = routing_metrics(statistics, expert_names=[f"e{index}" for index in range(33)])
    assert not [key for key in metrics if key.startswith("load/")]


def test_every_logged_step_is_one_json_object_and_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path / "runs" / "name", restored=None) as log:
        log.write(1, 1, {"loss": math.nan, "grad_norm": torch.tensor(2.5), "tokens": 7})
        log.write(1, 2, {"loss": math.inf, "grad_norm": None})
        lines = log.path.read_text().splitlines()  # before it is closed: each row was flushed
    assert "NaN" not in "".join(lines) and "Infinity" not in "".join(lines)
    assert [json.loads(line) for line in lines] == [
        {"stage": 1, "step": 1, "loss": None, "grad_norm": 2.5, "tokens": 7},
        {"stage": 1, "step": 2, "loss": None, "grad_norm": None},
    ]


def write_rows(folder: Path, *pairs: tuple[int, int], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    rows = [json.dumps({"stage": stage, "step": step, "loss": stage + step / 10}) for stage, step in pairs]
    path.write_text("".join(f"{row}\n" for row in rows) + tail)
    return path


def pairs_of(path: Path) -> list[tuple[int, int]]:
    return [(row["stage"], row["step"]) for row in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize(
    ("restored", "kept"),
    [
        (None, []),
        ((1, 2), [(1, 1), (1, 2)]),
        ((1, 9), [(1, 1), (1, 2), (1, 3)]),
        ((2, 1), [(1, 1), (1, 2), (1, 3), (2, 1)]),
        ((2, 0), [(1, 1), (1, 2), (1, 3)]),
    ],
)
def test_rows_past_the_restored_step_are_cut(tmp_path, restored, kept):
    path = write_rows(tmp_path, (1, 1), (1, 2), (1, 3), (2, 1), (2, 2))
    MetricsLog(tmp_path, restored=restored).close()
    assert pairs_of(path) == kept


@pytest.mark.parametrize("tail", ['{"stage": 1, "step": 3, "lo', '{"stage": 1, "st\xff', "\0\0\0"])
def test_a_torn_last_line_is_dropped_and_its_step_written_again(tmp_path, tail):
    path = write_rows(tmp_path, (1, 1), (1, 2), tail=tail)
    with MetricsLog(tmp_path, restored=(1, 2)) as log:
        log.write(1, 3, {"loss": 1.0})
    assert pairs_of(path) == [(1, 1), (1, 2), (1, 3)]


def test_a_step_that_was_written_twice_is_kept_once(tmp_path):
    path = write_rows(tmp_path, (1, 1), (1, 2), (1, 2), (1, 1))
    MetricsLog(tmp_path, restored=(1, 5)).close()
    assert pairs_of(path) == [(1, 1), (1, 2)]


def test_a_step_cannot_be_written_again(tmp_path):
    write_rows(tmp_path, (1, 1), (2, 4))
    with MetricsLog(tmp_path, restored=(2, 4)) as log:
        for stage, step in ((2, 4), (1, 9)):
            with pytest.raises(AssertionError):
                log.write(stage, step, {})
        assert log.last == (2, 4)


def test_reading_keeps_what_is_whole(tmp_path):
    path = write_rows(tmp_path, (1, 1), tail='[1]\n{"step": 2}\n{"stage": 1, "step": 2}\n{"stage"')
    assert [(row["stage"], row["step"]) for row in read_metrics(path)] == [(1, 1), (1, 2)]


def tensorboard_log(folder: Path, **options: int) -> TensorBoardLog:
    return TensorBoardLog(
        folder,
        expert_names=["a", "b", "c", "d"],
        domain_names=["law", "chess", "code"],
        router_names=["layers.0.q", "layers.0.v", "layers.1.q"],
        **options,
    )


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_tensorboard_gets_scalars_by_stage_and_heat_maps_every_few_steps_and_at_the_end(
    tmp_path, logits_MTE, domains_T
):
    statistics = make_statistics(logits_MTE, domains_T)
    with tensorboard_log(tmp_path, world_rank=0, heat_maps_every=2) as log:
        log.write(1, 1, {"stage": 1, "step": 1, "loss": 3.0, "rsl": None})
        for step in (1, 2, 3):
            row = {"loss": step + 0.5, "task_loss": math.nan, **routing_metrics(statistics)}
            log.write(2, step, row, statistics, last=step == 3)
    first, second = events(tmp_path / "stage1"), events(tmp_path / "stage2")
    assert first.Tags()["scalars"] == ["stage1/loss"]
    assert [event.value for event in second.Scalars("stage2/loss")] == [1.5, 2.5, 3.5]
    assert "stage2/task_loss" not in second.Tags()["scalars"]
    assert {"stage2/routing_entropy", "stage2/entropy_limit"} <= set(second.Tags()["scalars"])
    for name in ("stage2/load_by_domain", "stage2/load_by_router"):
        assert [event.step for event in second.Images(name)] == [2, 3]
        assert second.Images(name)[0].encoded_image_string.startswith(b"\x89PNG")


def test_a_resumed_run_makes_tensorboard_forget_the_steps_that_come_again(tmp_path):
    for first, steps in ((0.0, (1, 2, 3, 4)), (10.0, (3, 4, 5))):
        with tensorboard_log(tmp_path, world_rank=0) as log:
            for step in steps:
                log.write(2, step, {"loss": first + step})
    scalars = events(tmp_path / "stage2").Scalars("stage2/loss")
    assert [(event.step, event.value) for event in scalars] == [(1, 1), (2, 2), (3, 13), (4, 14), (5, 15)]


def test_only_rank_zero_writes_tensorboard_files(tmp_path, logits_MTE, domains_T):
    with tensorboard_log(tmp_path / "tensorboard", world_rank=1) as log:
        log.write(2, 1, {"loss": 1.0}, make_statistics(logits_MTE, domains_T), last=True)
    assert not (tmp_path / "tensorboard").exists()


def test_heat_maps_show_shares_of_tokens_and_load(logits_MTE, domains_T):
    statistics = make_statistics(logits_MTE, domains_T)
    _, by_domain = load_by_domain(statistics, "abcd", ["law", "chess", "code"])
    assert by_domain.values.sum(1) == pytest.approx([1, 1, 1])
    first_MT = logits_MTE[:, :40].argmax(2)
    expected = (first_MT[:, domains_T[:40] == 1] == 2).double().mean()
    assert by_domain.values[1, 2] == pytest.approx(float(expected))
    _, by_router = load_by_router(statistics, "abcd", ["x", "y", "z"])
    assert by_router.values.mean(1) == pytest.approx([1, 1, 1])


def test_heat_maps_of_many_show_64_and_say_so():
    generator = torch.Generator().manual_seed(1)
    statistics = make_statistics(
        torch.randn(70, 200, 80, generator=generator), torch.arange(200) % 50, num_domains=50
    )
    experts = [f"expert{index}" for index in range(80)]
    title, heat_map = load_by_router(statistics, experts, [f"router{index}" for index in range(70)])
    assert heat_map.values.shape == (64, 64)
    assert heat_map.rows[0] == "router0" and heat_map.rows[-1] == "router69"
    assert "64 evenly picked of 70 routers" in title and "64 largest of 80 experts" in title
    title, heat_map = load_by_domain(statistics, experts, [f"domain{index}" for index in range(50)])
    assert heat_map.values.shape == (50, 64) and "domains" not in title
    loads = statistics.domain_MGE.sum((0, 1))
    dropped = [index for index, name in enumerate(experts) if name not in heat_map.columns]
    assert loads[dropped].max() <= loads[[experts.index(name) for name in heat_map.columns]].min()


def test_rows_that_a_full_disk_does_not_take_are_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses to write on in the middle of a row, as a full disk does; one warning, no loss."""
    with MetricsLog(tmp_path, restored=None) as log:
        log.write(1, 1, {"loss": 1.0})
        try:
            limit_files((tmp_path / METRICS_FILE).stat().st_size + 10)
            log.write(1, 2, {"loss": 2.0})
            log.write(1, 3, {"loss": 3.0})
        finally:
            limit_files(None)
        assert capsys.readouterr().err.count("its rows wait") == 1
        log.write(1, 4, {"loss": 4.0})
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_rows_that_wait_at_the_end_are_told_and_end_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        with MetricsLog(tmp_path, restored=None) as log:
            limit_files(0)
            log.write(1, 1, {"loss": 1.0})
    finally:
        limit_files(None)
    assert "its last rows are lost" in capsys.readouterr().err


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from dsmixer.training.tensorboard import TensorBoardLog
names = {"expert_names": ["a"], "domain_names": ["a"], "router_names": ["r"]}
log = TensorBoardLog(Path(sys.argv[1]), world_rank=0, **names)
log.write(1, 1, {"loss": 1.0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(2, 3000):
    log.write(1, step, {"loss": 1.0, "task_loss": 1.0})
log.close()
print("went on")
"""


def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path: Path) -> None:
    """Files that cannot grow stand for it; the writer's thread meets the error."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("went on\n"), done.stderr[-2000:]
    assert done.stderr.count("nothing more is written to") == 1
