"""Who spoke at each token of a few held-out texts, kept while the mixture is scored: no pass is added.

Shapes: X texts, P tokens of a text, L layers, T tokens of a forward pass, E experts, H loudest experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmixer.checkpoint import atomic
from dsmixer.config.errors import RefusedError
from dsmixer.config.outline import evenly, layer_name
from dsmixer.data.collate import MicroBatch
from dsmixer.evaluation.pieces import pieces
from dsmixer.evaluation.sharing import summed
from dsmixer.evaluation.sheet import Sheet
from dsmixer.model.inject import Mixture
from dsmixer.routing.context import Stream
from dsmixer.routing.statistics import RouterOutput

EXAMPLES_FILE = "examples.json"
MAX_DOMAINS = 12  # with texts in the file, evenly picked of more
TEXTS_A_DOMAIN = 2
MAX_TOKENS = 80  # of a text; of a longer one those around the start of its completion
MAX_LAYERS = 24  # told of each token, evenly picked of more
HEARD = 8  # experts of a token whose mean weight is told, the loudest
HEARD_IN_LAYER = 2
SILENT = 5e-5  # a weight below it is none: it would be written as 0


@dataclass(frozen=True)
class Excerpt:
    """A stretch of one held-out text.

    Attributes:
        row: of the sheet.
        domain, own_expert: names.
        ids: of the whole text, as the model reads it.
        num_prompt: tokens of the prompt, of the whole text.
        begin, end: the stretch that is told of.
        two_sided: whether an encoder reads the prompt and a decoder the rest.
    """

    row: int
    domain: str
    own_expert: str
    ids: tuple[int, ...]
    num_prompt: int
    begin: int
    end: int
    two_sided: bool


def excerpts_of(sheet: Sheet) -> list[Excerpt]:
    """Of each domain the first texts that fit, then the first of the longer ones."""
    found = []
    for domain in evenly(len(sheet.domains), MAX_DOMAINS):
        rows = [row for row in sheet.rows([domain]) if sheet.is_target_row[row]]
        longer = [row for row in rows if sheet.store.lengths[row] > MAX_TOKENS]
        fitting = [row for row in rows if sheet.store.lengths[row] <= MAX_TOKENS]
        found += [_excerpt(sheet, domain, row) for row in (*fitting, *longer)[:TEXTS_A_DOMAIN]]
    return found


def _excerpt(sheet: Sheet, domain: int, row: int) -> Excerpt:
    store = sheet.store
    ids, num_prompt = store.input_ids(row).tolist(), int(store.target_starts[row])
    begin = min(max(0, num_prompt - MAX_TOKENS // 2), max(0, len(ids) - MAX_TOKENS))
    two_sided = store.decoder_start is not None
    if two_sided:  # the decoder reads what it wrote, one token behind
        ids = [*ids[:num_prompt], store.decoder_start, *ids[num_prompt:-1]]
    end = min(len(ids), begin + MAX_TOKENS)
    names = sheet.domains[domain], sheet.own_experts[domain]
    return Excerpt(row, *names, tuple(ids), num_prompt, begin, end, two_sided)


@dataclass
class _Place:
    """Where in a forward pass the tokens of the excerpts are: text x, its token p, the stream's token t."""

    x: list[int]
    p: list[int]
    t: list[int]


class _Sum:
    """Of one tensor after another, each counted some times."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._times = 0

    def add(self, values: torch.Tensor, times: int) -> None:
        self._total = times * values if self._total is None else self._total.add_(values, alpha=times)
        self._times += times

    def mean(self) -> torch.Tensor:
        assert self._total is not None
        return self._total / self._times


class ExampleWeights:
    """Collects the weights of experts at the tokens of a sheet's excerpts, one forward pass after another.

    Args:
        mixture: whose routers are watched.
        sheet: whose texts are scored.
    """

    def __init__(self, mixture: Mixture, sheet: Sheet) -> None:
        self.excerpts = excerpts_of(sheet)
        self.num_domains = len(sheet.domains)
        self.experts = list(mixture.expert_names)
        self._streams = mixture.streams
        self._uses = [0] * len(mixture.routers)  # projections that a router serves
        for mixer in mixture.mixers.values():
            self._uses[mixer.router_index] += 1
        self._layer_of = [layer_name(path) for path in mixture.routers]
        names = list(dict.fromkeys(self._layer_of))
        self.num_layers = len(names)
        self.layers = [names[index] for index in evenly(len(names), MAX_LAYERS)]
        self._x_of = {excerpt.row: x for x, excerpt in enumerate(self.excerpts)}
        shape = (len(self.excerpts), MAX_TOKENS)
        kept = (min(HEARD, len(self.experts)), min(HEARD_IN_LAYER, len(self.experts)))
        self._mean_XPH2 = torch.zeros(*shape, kept[0], 2)
        self._layers_XPLH2 = torch.zeros(*shape, len(self.layers), kept[1], 2)
        self._entropy_XP = torch.zeros(shape)
        self._read_XP = torch.zeros(shape)
        self._places: dict[Stream, _Place] = {}
        self._sums: dict[Stream, _Sum] = {}
        self._layer_sums: dict[Stream, tuple[str, _Sum]] = {}

    @contextmanager
    def watching(self, micro: MicroBatch) -> Iterator[None]:
        """Around the forward pass of some rows."""
        self._places, self._sums, self._layer_sums = self._placed(micro), {}, {}
        try:
            yield
            for stream, place in self._places.items():
                self._keep(stream, place)
        finally:
            self._places, self._sums, self._layer_sums = {}, {}, {}

    def _placed(self, micro: MicroBatch) -> dict[Stream, _Place]:
        found: dict[Stream, _Place] = {}
        widths: dict[Stream, int] = {"decoder": micro.input_ids.shape[1]}
        if micro.encoder is not None:
            widths["encoder"] = micro.encoder.input_ids.shape[1]
        for b, row in enumerate(micro.example_ids[:, 0].tolist()):
            x = self._x_of.get(row)
            if x is None:
                continue
            excerpt = self.excerpts[x]
            for p in range(excerpt.begin, excerpt.end):
                written = not excerpt.two_sided or p >= excerpt.num_prompt
                stream: Stream = "decoder" if written else "encoder"
                t = p - excerpt.num_prompt if excerpt.two_sided and written else p
                place = found.setdefault(stream, _Place([], [], []))
                place.x.append(x)
                place.p.append(p - excerpt.begin)
                place.t.append(b * widths[stream] + t)
        return found

    @torch.no_grad()
    def record(self, router: int, output: RouterOutput) -> None:
        """Add what one router makes of the excerpts' tokens in the present pass, if any are in it."""
        stream = self._streams[router]
        place = self._places.get(stream)
        if place is None:
            return
        heard_NE = heard_at(output, place.t)
        entropy_N1 = torch.special.entr(output.p_TE[place.t]).sum(1, keepdim=True)
        heard_NE, entropy_N1 = heard_NE.cpu(), entropy_N1.float().cpu()
        uses, layer = self._uses[router], self._layer_of[router]
        self._sums.setdefault(stream, _Sum()).add(torch.cat([heard_NE, entropy_N1], dim=1), uses)
        if stream in self._layer_sums and self._layer_sums[stream][0] != layer:
            self._keep_layer(stream, place)
        if layer in self.layers:
            self._layer_sums.setdefault(stream, (layer, _Sum()))[1].add(heard_NE, uses)

    def _keep_layer(self, stream: Stream, place: _Place) -> None:
        """Put the loudest of the layer that is through in place of its sums: layers follow each other."""
        layer, heard = self._layer_sums.pop(stream)
        loudest = _loudest(heard.mean(), self._layers_XPLH2.shape[3])
        self._layers_XPLH2[place.x, place.p, self.layers.index(layer)] = loudest

    def _keep(self, stream: Stream, place: _Place) -> None:
        if stream not in self._sums:
            return  # no router reads this stream
        if stream in self._layer_sums:
            self._keep_layer(stream, place)
        mean_NE = self._sums[stream].mean()
        self._mean_XPH2[place.x, place.p] = _loudest(mean_NE[:, :-1], self._mean_XPH2.shape[2])
        self._entropy_XP[place.x, place.p] = mean_NE[:, -1]
        self._read_XP[place.x, place.p] = 1

    def over_ranks(self, device: torch.device) -> ExampleWeights:
        """Itself, with what the other ranks read; a collective."""
        for name in ("_mean_XPH2", "_layers_XPLH2", "_entropy_XP", "_read_XP"):
            setattr(self, name, summed(getattr(self, name), device))
        return self

    def as_json(self, tokenizer: Any) -> dict[str, Any]:
        """The content of ``examples.json``.

        Returns:
            ``experts``: names; ``num_domains``, ``num_layers``: how many there are; ``layers``: names of
            those told of; ``texts``: of each ``domain``, ``own_expert``, ``num_tokens`` of the whole text,
            ``begin`` of the stretch in it, and ``tokens``: ``id``, ``text``, ``part`` (``prompt`` or
            ``answer``), ``weights``: pairs of an expert's index and its weight, mean over the projections,
            the loudest first; ``entropy``, nats, likewise; ``layers``: such pairs in each layer. A token that
            no router read has null for these three.
        """
        texts = [self._text(x, tokenizer) for x in range(len(self.excerpts)) if self._read_XP[x].any()]
        counts = {"num_domains": self.num_domains, "num_layers": self.num_layers}
        return {"experts": self.experts, **counts, "layers": self.layers, "texts": texts}

    def _text(self, x: int, tokenizer: Any) -> dict[str, Any]:
        excerpt = self.excerpts[x]
        cut = excerpt.num_prompt if excerpt.two_sided else 0  # two streams are two texts
        parts = [*pieces(tokenizer, excerpt.ids[:cut]), *pieces(tokenizer, excerpt.ids[cut:])]
        tokens = [self._token(x, p, parts[p]) for p in range(excerpt.begin, excerpt.end)]
        return {
            "domain": excerpt.domain,
            "own_expert": excerpt.own_expert,
            "num_tokens": len(excerpt.ids),
            "begin": excerpt.begin,
            "tokens": tokens,
        }

    def _token(self, x: int, p: int, text: str) -> dict[str, Any]:
        excerpt = self.excerpts[x]
        part = "prompt" if p < excerpt.num_prompt else "answer"
        found: dict[str, Any] = {"id": excerpt.ids[p], "text": text, "part": part}
        place = x, p - excerpt.begin
        if not self._read_XP[place]:
            return {**found, "weights": None, "entropy": None, "layers": None}
        layers = [_pairs(layer) for layer in self._layers_XPLH2[place].tolist()]
        entropy = round(float(self._entropy_XP[place]), 4)
        return {
            **found,
            "weights": _pairs(self._mean_XPH2[place].tolist()),
            "entropy": entropy,
            "layers": layers,
        }


def heard_at(output: RouterOutput, tokens: Sequence[int]) -> torch.Tensor:
    """The weights that experts speak with at some tokens, ``[N, E]`` float32, zeros included."""
    choice = output.choice
    if choice.gate_TE is not None:
        return choice.gate_TE[tokens].float()
    nothing_NE = torch.zeros_like(output.p_TE[tokens], dtype=torch.float32)
    return nothing_NE.scatter_add(1, choice.indices_TK[tokens], choice.weights_TK[tokens].float())


def _loudest(weights_NE: torch.Tensor, number: int) -> torch.Tensor:
    """Index and weight of the largest, ``[N, H, 2]``."""
    top = weights_NE.topk(number, dim=1)
    return torch.stack([top.indices.to(top.values.dtype), top.values], dim=2)


def _pairs(pairs: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[int(expert), round(weight, 4)] for expert, weight in pairs if weight >= SILENT]


def write_examples(run_folder: Path, examples: ExampleWeights | None, tokenizer: Any) -> None:
    """Write ``examples.json``; where no text was read, none is left from an evaluation before.

    Raises:
        RefusedError: it can't be written.
    """
    path = run_folder / EXAMPLES_FILE
    found = {"texts": []} if examples is None else examples.as_json(tokenizer)
    try:
        if found["texts"]:
            atomic.write_json(path, found, indent=None)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RefusedError(f"cannot be written: {error}", where=str(path), fix="make room") from error
