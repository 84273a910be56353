"""The figures of a model that a placement plan needs, from its modules; the meta device will do."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from dsmixer.model.quantized import packed_weights
from dsmixer.model.state_space import KERNEL_PACKAGES, is_state_space
from dsmixer.model.streams import CROSS_ATTENTION, is_encoder_decoder
from dsmixer.model.targets import Target, find_targets, is_projection, projection_widths
from dsmixer.placement.request import (
    EncoderShape,
    LayerShape,
    ModelShape,
    Projection,
    StateSpaceShape,
    parameter_sizes,
)

_KEPT_INPUTS = (("o",), ("dt",))
"""Roles whose input the base keeps anyway: attention keeps its output, a scan what ``x_proj`` gave."""


def model_shape(model: PreTrainedModel, targets: Sequence[str]) -> ModelShape:
    """What a plan needs of a base model, before mixers are attached.

    Args:
        model: a transformers decoder model.
        targets: roles and names of linear modules, as in ``MixerConfig``.

    Raises:
        UserError: a target matches nothing.
    """
    found = find_targets(model, targets)
    projections = tuple(
        Projection(t.in_features, t.out_features, t.block, t.roles in _KEPT_INPUTS or _reads_encoder(t))
        for t in found
    )
    # a weight that two modules share stands once among the parameters, and so once here
    numels = [parameter.numel() for parameter in model.parameters()]
    quantizable = parameter_sizes([weight.numel() for weight in packed_weights(model)])
    return ModelShape(parameter_sizes(numels), quantizable, projections, layer_shape(model))


def _reads_encoder(target: Target) -> bool:
    """Whether it is a decoder's key or value of what the encoder read, which is kept once for all layers."""
    return f"{CROSS_ATTENTION}." in target.path and target.roles in (("k",), ("v",))


def layer_shape(model: Any) -> LayerShape:
    """Widths of a model's layers, by the names that transformers' configurations use."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        return _state_space_layers(model, config)
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    widths = [projection_widths(m) for m in model.modules() if is_projection(m)]
    named = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "d_ff"))
    mlp = int(next(filter(None, named), 4 * hidden))
    into = sum(width_out // mlp for _, width_out in widths if width_out in (mlp, 2 * mlp))
    return LayerShape(
        hidden=hidden,
        mlp=mlp,
        gated=into >= 2 * config.num_hidden_layers,
        query=heads * head_dim,
        key_value=key_value_heads * head_dim,
        heads=heads,
        layers=int(config.num_decoder_layers if is_encoder_decoder(config) else config.num_hidden_layers),
        vocabulary=int(config.vocab_size),
        eager=getattr(config, "_attn_implementation", None) == "eager",
        encoder=_encoder_shape(config) if is_encoder_decoder(config) else None,
    )


def _encoder_shape(config: Any) -> EncoderShape:
    """Of T5 and its kin. Their GELU is written out, and keeps four intermediate results."""
    activation, gated = config.dense_act_fn, bool(config.is_gated_act)
    alone = 4 if activation == "gelu_new" else 1
    # the product keeps both of its factors, of which a ReLU keeps one anyway
    factors = 1 if activation == "relu" else 2
    return EncoderShape(int(config.num_layers), alone + gated * factors, config.dropout_rate > 0)


def _state_space_layers(model: Any, config: Any) -> LayerShape:
    mixer = next(module for module in model.modules() if is_state_space(module))
    heads = 0 if hasattr(mixer, "x_proj") else int(mixer.num_heads)
    shape = StateSpaceShape(
        inner=int(mixer.out_proj.in_features),
        state=int(mixer.ssm_state_size),
        selected=0 if heads else int(mixer.x_proj.out_features),
        channels=int(mixer.conv1d.in_channels),
        heads=heads,
        chunk=int(mixer.chunk_size) if heads else 0,
        fused=all(find_spec(package) is not None for package in KERNEL_PACKAGES),
    )
    return LayerShape(
        hidden=int(config.hidden_size),
        mlp=0,
        gated=False,
        query=0,
        key_value=0,
        heads=0,
        layers=int(config.num_hidden_layers),
        vocabulary=int(config.vocab_size),
        wide_residual=bool(config.residual_in_fp32),
        wide_logits=True,
        state_space=shape,
    )
