"""Which cases are measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product

from tests.bench.case import Case

EXPERTS, RANKS, WIDTHS = (6, 16, 64, 196, 512), (16, 64), (1024, 2048)
SEQUENCES, DTYPES = (128, 512, 1024, 4096), ("float32", "bfloat16")
PROMPT = 128
SHORT = {"widths": [256], "experts": [6], "ranks": [16], "sequence": [64], "dtypes": ["float32"]}
Line = tuple[int, str, int, int, int | None]
"""Width, dtype, E, r, tokens of a training row; None: decoding."""

CHOSEN: tuple[Line, ...] = (
    (2048, "float32", 6, 64, 1024),
    (2048, "float32", 196, 16, 1024),
    (2048, "bfloat16", 6, 64, 1024),
    (2048, "bfloat16", 196, 16, 1024),
    (1024, "float32", 6, 64, 1024),
    (1024, "float32", 196, 16, 1024),
    (1024, "bfloat16", 6, 64, 1024),
    (1024, "bfloat16", 196, 16, 1024),
    (1024, "float32", 16, 64, 512),
    (1024, "float32", 64, 64, 512),
    (1024, "float32", 196, 16, 512),
    (1024, "float32", 512, 16, 256),
    (1024, "float32", 6, 64, 128),
    (1024, "float32", 6, 64, 4096),
    (1024, "float32", 6, 16, 512),
    (2048, "float32", 64, 64, 512),
    (2048, "bfloat16", 64, 64, 512),
    (2048, "float32", 6, 64, None),
    (2048, "float32", 196, 16, None),
    (2048, "bfloat16", 6, 64, None),
    (2048, "bfloat16", 196, 16, None),
    (1024, "float32", 6, 64, None),
    (1024, "float32", 16, 64, None),
    (1024, "float32", 64, 64, None),
    (1024, "float32", 196, 16, None),
    (1024, "float32", 512, 16, None),
    (1024, "bfloat16", 6, 64, None),
    (1024, "bfloat16", 64, 64, None),
    (1024, "float32", 6, 16, None),
)
"""Measured if nothing is asked for: each target, each number of experts, both ends of the sequence."""

QUICK: tuple[Line, ...] = (
    (2048, "float32", 6, 64, 512),
    (2048, "float32", 196, 16, 512),
    (2048, "bfloat16", 6, 64, 512),
    (2048, "bfloat16", 196, 16, 512),
    (1024, "float32", 6, 64, 512),
    (1024, "bfloat16", 6, 64, 512),
    (1024, "float32", 16, 64, 256),
    (1024, "float32", 64, 64, 256),
    (1024, "float32", 196, 16, 256),
    (1024, "float32", 512, 16, 128),
    (1024, "float32", 6, 64, 128),
    (2048, "float32", 6, 64, None),
    (2048, "float32", 196, 16, None),
    (2048, "bfloat16", 6, 64, None),
    (1024, "float32", 64, 64, None),
    (1024, "float32", 196, 16, None),
)
"""In less than half the time: each target, each number of experts in training, shorter rows."""


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the command line: what it names, crossed, or ``CHOSEN`` or ``QUICK``."""
    asked = [args.widths, args.experts, args.ranks, args.sequence, args.dtypes]
    if args.short or args.full or any(value is not None for value in asked):
        return list(_crossed(args))
    return [
        _case(args, "decode" if tokens is None else "train", width, experts, rank, tokens or PROMPT, dtype)
        for width, dtype, experts, rank, tokens in (QUICK if args.quick else CHOSEN)
        if ("decode" if tokens is None else "train") in args.what
    ]


def _crossed(args: argparse.Namespace) -> Iterator[Case]:
    small = SHORT if args.short else {}
    widths = args.widths or small.get("widths") or WIDTHS
    experts = args.experts or small.get("experts") or EXPERTS
    ranks = args.ranks or small.get("ranks") or RANKS
    sequences = args.sequence or small.get("sequence") or SEQUENCES
    dtypes = args.dtypes or small.get("dtypes") or DTYPES
    for what in args.what:
        lengths = sequences if what == "train" else [PROMPT]
        for width, dtype, rank, length, number in product(widths, dtypes, ranks, lengths, experts):
            yield _case(args, what, width, number, rank, length, dtype)


def _case(
    args: argparse.Namespace, what: str, width: int, experts: int, rank: int, sequence: int, dtype: str
) -> Case:
    return Case(
        what=what,
        width=width,
        layers=args.layers,
        experts=experts,
        rank=rank,
        rows=args.rows,
        sequence=sequence,
        dtype=dtype,
        device=args.device,
        vocabulary=args.vocabulary,
    )
