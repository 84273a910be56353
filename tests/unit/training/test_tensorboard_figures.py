"""Pictures of the routers in TensorBoard: entropy by layer of a step, and the report's at a run's end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmixer.routing.statistics import RoutingStatistics
from dsmixer.training.tensorboard import TensorBoardLog, draw_held_out, entropy_by_layer, load_by_router

ROUTERS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (0, "v"), (1, "q"))]


@pytest.fixture
def statistics():
    """Three routers: the first saw 4 tokens of 2 nats in all, the second 2 of 3 nats, the third none."""
    found = RoutingStatistics(3, 4)
    found.tokens_M[:] = torch.tensor([4.0, 2.0, 0.0])
    found.entropy_M[:] = torch.tensor([2.0, 3.0, 0.0])
    found.weight_ME[:2] = 1
    return found


def images(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_entropy_of_a_layer_is_the_mean_of_its_routers_that_saw_tokens(statistics):
    line, limit = entropy_by_layer(statistics, ROUTERS).axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([(0.5 + 1.5) / 2, math.nan], nan_ok=True)
    assert list(limit.get_ydata()) == pytest.approx([math.log(4)] * 2)


def test_a_step_is_drawn_by_layer(tmp_path, statistics):
    names = {"expert_names": "abcd", "router_names": ROUTERS}
    with TensorBoardLog(tmp_path, world_rank=0, **names) as log:
        log.write(2, 7, {"loss": 1.0}, statistics, last=True)
    assert [event.step for event in images(tmp_path / "stage2").Images("stage2/entropy_by_layer")] == [7]


def write_run(folder, share, *, losses=False):
    routing = {"routers": ROUTERS, "experts": ["a", "b"], "domains": ["a", "b"], "entropy": [0.5, 0.4, 0.1]}
    routing |= {key: [[share, share]] * 3 for key in ("own_first_share", "own_probability")}
    routing["load"] = [[[share, 1 - share], [1 - share, share]]] * 3
    (folder / "routing.json").write_text(json.dumps(routing))
    (folder / "config.yaml").write_text("run: {name: x}\n")
    values = {"base": 2.0, "expert:a": 1.0, "expert:b": 1.5, "mixture": 1.0 + share}
    rows = [{"domain": d, "method": m, "metric": "loss", "value": v} for d in "ab" for m, v in values.items()]
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows if losses else []}))


def test_what_each_expert_is_worth_is_drawn_too_and_follows_the_losses(tmp_path):
    seen = []
    for share in (0.9, 0.2):
        write_run(tmp_path, share, losses=True)
        draw_held_out(tmp_path)
        (event,) = images(tmp_path / "tensorboard" / "held_out").Images("held_out/experts_on_domains")
        seen.append(event.encoded_image_string)
    assert seen[0] != seen[1]
    (tmp_path / "routing.json").unlink()  # no mixture was scored: its experts still were
    draw_held_out(tmp_path)
    assert images(tmp_path / "tensorboard" / "held_out").Tags()["images"] == ["held_out/experts_on_domains"]


def test_a_router_is_named_by_layer_and_projection_where_its_path_has_no_room(statistics):
    paths = [
        "encoder.block.3.layer.0.SelfAttention.q",
        "encoder.block.3.layer.0.SelfAttention.v",
        "model.layers.1.self_attn.q_proj",
    ]
    _, heat_map = load_by_router(statistics, "abcd", paths)
    assert heat_map.rows == ["encoder 3 SelfAttention.q", "encoder 3 SelfAttention.v", "1 self_attn.q_proj"]


def test_the_reports_figures_are_drawn_at_the_end_over_those_of_an_earlier_evaluation(tmp_path):
    seen = []
    for share in (0.9, 0.2):
        write_run(tmp_path, share)
        draw_held_out(tmp_path)
        found = images(tmp_path / "tensorboard" / "held_out")
        assert sorted(found.Tags()["images"]) == [
            "held_out/entropy_of_a_token_by_layer_beside_ln_e",
            "held_out/first_expert_of_a_token_by_domain",
            "held_out/first_expert_of_a_token_by_layer",
            "held_out/own_expert_first_by_layer_and_domain",
            "held_out/probability_of_the_own_expert_by_layer_and_domain",
        ]
        (event,) = found.Images("held_out/first_expert_of_a_token_by_domain")
        seen.append(event.encoded_image_string)
    assert all(picture.startswith(b"\x89PNG") for picture in seen) and seen[0] != seen[1]


def test_nothing_is_drawn_where_it_is_not_wanted_or_not_known(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    draw_held_out(tmp_path)
    write_run(tmp_path, 0.5)
    draw_held_out(tmp_path, enabled=False)
    assert not (tmp_path / "tensorboard").exists()
