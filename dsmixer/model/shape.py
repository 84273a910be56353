"""The figures of a model that a placement plan needs, from its modules; the meta device will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from dsmixer.model.quantized import packed_weights
from dsmixer.model.targets import find_targets, is_projection, projection_widths
from dsmixer.placement.request import LayerShape, ModelShape, Projection, parameter_sizes


def model_shape(model: PreTrainedModel, targets: Sequence[str]) -> ModelShape:
    """What a plan needs of a base model, before mixers are attached.

    Args:
        model: a transformers decoder model.
        targets: role letters and names of linear modules, as in ``MixerConfig``.

    Raises:
        UserError: a target matches nothing.
    """
    found = find_targets(model, targets)
    projections = tuple(Projection(t.in_features, t.out_features, t.block) for t in found)
    # a weight that two modules share stands once among the parameters, and so once here
    numels = [parameter.numel() for parameter in model.parameters()]
    quantizable = parameter_sizes([weight.numel() for weight in packed_weights(model)])
    return ModelShape(parameter_sizes(numels), quantizable, projections, layer_shape(model))


def layer_shape(model: Any) -> LayerShape:
    """Widths of a decoder's layers, by the names that transformers' configurations use."""
    config = model.config.get_text_config()
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    widths = [projection_widths(m) for m in model.modules() if is_projection(m)]
    mlp = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden)
    into = sum(width_out // mlp for _, width_out in widths if width_out in (mlp, 2 * mlp))
    return LayerShape(
        hidden=hidden,
        mlp=mlp,
        gated=into >= 2 * config.num_hidden_layers,
        query=heads * head_dim,
        key_value=key_value_heads * head_dim,
        heads=heads,
        layers=int(config.num_hidden_layers),
        vocabulary=int(config.vocab_size),
        eager=getattr(config, "_attn_implementation", None) == "eager",
    )
