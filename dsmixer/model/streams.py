"""The two streams of tokens in an encoder-decoder model: what the encoder reads, and what the decoder writes.

In the encoder every projection sees the tokens of the prompt. So do the key and value projections of the
decoder's attention to the encoder; all others of the decoder see the tokens of the answer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dsmixer.config.errors import UserError
from dsmixer.routing.context import Stream

ENCODER_DECODERS = frozenset(("t5", "mt5", "umt5"))
"""Types that were tried. Others may cut a row into blocks or pad it inside, so that tokens are not where the
batch has them."""

CROSS_ATTENTION = "EncDecAttention"
"""What these types call the decoder's attention to the encoder."""


def is_encoder_decoder(config: Any) -> bool:
    """Whether a transformers configuration is of a model with an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def decoder_start(config: Any) -> int | None:
    """The token from which an encoder-decoder model's decoder starts to write; None for a decoder alone.

    Raises:
        UserError: the configuration does not say.
    """
    if not is_encoder_decoder(config):
        return None
    start = getattr(config, "decoder_start_token_id", None)
    if not isinstance(start, int):
        raise UserError(
            "the base's configuration does not say from which token its decoder starts",
            where="decoder_start_token_id of its config.json",
            fix="write it there; T5 starts from its padding token, 0",
        )
    return start


def stream_of(model: nn.Module, path: str) -> Stream:
    """Whose tokens a projection sees, by the place of its module path in the model."""
    if not is_encoder_decoder(getattr(model, "config", None)):
        return "decoder"
    if path.startswith("encoder."):
        return "encoder"
    attention, _, name = path.rpartition(".")
    across = attention.endswith(CROSS_ATTENTION) and name in ("k", "v")
    return "encoder" if across else "decoder"
