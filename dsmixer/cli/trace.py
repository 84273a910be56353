"""What ``dsmixer generate --trace`` collects while it writes, as plain values for the views of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsmixer.evaluation.pieces import pieces
from dsmixer.report.trace_data import Trace, TracedToken

if TYPE_CHECKING:
    from dsmixer.model.inject import Mixture
    from dsmixer.routing.context import Stream
    from dsmixer.routing.trace import TokenTrace

HELD = 1e-6  # a weight below this says nothing


@contextmanager
def tracing(model: Any) -> Iterator[TokenTrace]:
    """While it is open, the routers' choices for the one row that ``model`` works on are kept."""
    from dsmixer.model.inject import mixture_of
    from dsmixer.routing.context import BatchRouting
    from dsmixer.routing.trace import TokenTrace

    mixture = mixture_of(model)
    kept = TokenTrace(len(mixture.routers), len(mixture.expert_names))
    try:
        with mixture.context.recording(BatchRouting(), kept):
            yield kept
    finally:
        mixture.context.clear()


def trace_of(
    model: Any,
    tokenizer: Any,
    kept: TokenTrace,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    name: str,
) -> Trace:
    """Join tokens and choices.

    Args:
        model: the model that wrote.
        tokenizer: its own.
        kept: what ``tracing`` collected.
        prompt_ids: as given to ``generate``.
        output_ids: what ``generate`` gave back for the row: behind a decoder alone the prompt comes first,
            behind an encoder the decoder's start token.
        name: of the mixture.
    """
    from dsmixer.model.inject import mixture_of
    from dsmixer.model.streams import is_encoder_decoder

    mixture = mixture_of(model)
    if is_encoder_decoder(model.config):
        read = _stream(mixture, tokenizer, kept, "encoder", prompt_ids, len(prompt_ids))
        written = _stream(mixture, tokenizer, kept, "decoder", output_ids, 0)
    else:
        read, written = [], _stream(mixture, tokenizer, kept, "decoder", output_ids, len(prompt_ids))
    return Trace(name, mixture.expert_names, list(mixture.routers), [*read, *written])


def _stream(
    mixture: Mixture, tokenizer: Any, kept: TokenTrace, stream: Stream, ids: Sequence[int], num_prompt: int
) -> list[TracedToken]:
    """The tokens of one stream; those that no router saw come last."""
    import torch

    uses = torch.zeros(len(mixture.routers))
    for mixer in mixture.mixers.values():
        uses[mixer.router_index] += 1
    here = [index for index, of in enumerate(mixture.streams) if of == stream]
    weights = {index: kept.weights_TE(index) for index in here}
    num_read = min((len(of_one) for of_one in weights.values()), default=0)
    shares = uses[here] / uses[here].sum()
    mean_TE = sum(share * weights[index][:num_read] for share, index in zip(shares, here, strict=True))
    mean_T = sum(share * kept.entropy_T(index)[:num_read] for share, index in zip(shares, here, strict=True))
    paths = list(mixture.routers)
    tokens = []
    for place, (token, text) in enumerate(zip(ids, pieces(tokenizer, ids), strict=True)):
        part = "prompt" if place < num_prompt else "answer"
        if place >= num_read:
            tokens.append(TracedToken(token, text, part))
            continue
        heard = {paths[index]: _heard(weights[index][place].tolist(), mixture.expert_names) for index in here}
        tokens.append(
            TracedToken(token, text, part, tuple(mean_TE[place].tolist()), float(mean_T[place]), heard)
        )
    return tokens


def _heard(weights_E: Sequence[float], names: Sequence[str]) -> list[tuple[str, float]]:
    heard = [(name, weight) for name, weight in zip(names, weights_E, strict=True) if weight > HELD]
    return sorted(heard, key=lambda pair: -pair[1])


def trace_json(trace: Trace) -> dict[str, Any]:
    """Plain JSON values: ``experts``, ``routers``, and ``tokens`` with ``weights`` by expert, ``entropy``,
    and the experts heard at each router; null where no router read the token.
    """
    tokens = [
        {
            "id": token.id,
            "text": token.text,
            "part": token.part,
            "weights": None
            if token.weights is None
            else {
                name: weight
                for name, weight in zip(trace.experts, token.weights, strict=True)
                if weight > HELD
            },
            "entropy": token.entropy,
            "routers": None
            if token.routers is None
            else {path: [list(pair) for pair in heard] for path, heard in token.routers.items()},
        }
        for token in trace.tokens
    ]
    return {"experts": list(trace.experts), "routers": list(trace.routers), "tokens": tokens}
