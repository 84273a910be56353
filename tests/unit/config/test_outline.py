"""Names of layers, and places picked of many."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dsmixer.config.outline import evenly, layer_name, layer_number, short_layer_name


@pytest.mark.parametrize(
    ("path", "number", "name", "short"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "layer 12", "12"),
        ("transformer.h.0.attn.c_attn", 0, "layer 0", "0"),
        ("decoder.block.3.layer.1.EncDecAttention.k", 3, "decoder layer 3", "decoder 3"),
        ("encoder.block.11.layer.0.SelfAttention.q", 11, "encoder layer 11", "encoder 11"),
        ("model.decoder.layers.3.self_attn.q_proj", 3, "layer 3", "3"),
        ("lm_head", None, "lm_head", "lm_head"),
        ("decoder.head2.q", None, "decoder.head2.q", "decoder.head2.q"),
    ],
)
def test_a_layer_is_named_by_the_first_number_of_a_path_and_its_side(path, number, name, short):
    assert layer_number(path) == number and layer_name(path) == name and short_layer_name(name) == short


@pytest.mark.parametrize(
    ("count", "limit"), [(0, 2), (1, 64), (64, 64), (65, 64), (97, 24), (1000, 12), (3, 2)]
)
def test_picked_places_are_as_many_as_allowed_with_both_ends_and_like_steps(count, limit):
    places = evenly(count, limit)
    assert len(set(places)) == len(places) == min(count, limit)
    if count:
        assert places[0] == 0 and places[-1] == count - 1
    steps = {after - before for before, after in pairwise(places)}
    assert not steps or max(steps) - min(steps) <= 1
