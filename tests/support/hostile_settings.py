"""Configurations of adapters that nobody should believe: numbers, targets, kinds and texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from support.sound_adapter import CONFIG, Hostile, sound_config, write_config


def settings(name: str, **changes: Any) -> Hostile:
    return Hostile(name, lambda folder, _: write_config(folder, {**sound_config(), **changes}))


def numbers() -> Iterator[Hostile]:
    """Ranks and scales that can't be."""
    for rank in (0, -2, 1, 3, 10**9, 10**30, 2.0, 2.5, "2", True, None, [2], {"r": 2}):
        yield settings(f"r {rank!r}", r=rank)
    for alpha in (0, -0.0, -1e300, 1e300, 10**400, "4", True, None, [4], {}):
        yield settings(f"alpha {str(alpha)[:9]!r}", lora_alpha=alpha)
    for name in ("rank_pattern", "alpha_pattern"):
        for value in ([2], "q_proj", 3, {"q_proj": "2"}, {"q_proj": 0}, {"q_proj": True}):
            yield settings(f"{name} {value!r}", **{name: value})
    yield settings("a negative rank", rank_pattern={"q_proj": -1})
    yield settings("a rank_pattern that lies", rank_pattern={"q_proj": 7})
    yield settings("a rank_pattern of 10,000", rank_pattern={f"layer_{i}": 2 for i in range(10_000)})


CATASTROPHIC = ("(.*)*(.*)*(.*)*(.*)*x", "(([a-z._0-9]+)+)+!")
"""Patterns that would try for years."""


def targets() -> Iterator[Hostile]:
    """Targets that nobody could mean, and patterns that would keep a reader busy for years."""
    yield settings("10,000 targets", target_modules=[f"layer_{i}" for i in range(10_000)])
    yield settings("10,000 excluded", exclude_modules=[f"layer_{i}" for i in range(10_000)])
    yield settings("a target of a megabyte", target_modules=["q_proj", "a" * 2**20])
    for value in (7, 2.5, True, {"q_proj": 1}, [["q_proj"]], [None], ["q_proj", 3]):
        yield settings(f"targets {value!r}", target_modules=value)
    for pattern in ("(", "[", "*", "(?P<a>x)(?P<a>y)", "a{99999999999}", "(?<=a+)b", "\\"):
        yield settings(f"broken pattern {pattern!r}", target_modules=pattern)
    yield settings("pattern of another adapter", target_modules=r".*\.(k|o)_proj")
    for pattern in CATASTROPHIC:
        yield settings(f"pattern {pattern}", target_modules=pattern)
    yield settings("pattern of exclusion", exclude_modules=CATASTROPHIC[0])
    yield settings("pattern of a rank", rank_pattern={CATASTROPHIC[1]: 2})
    yield settings("pattern of layers", layers_to_transform=[0, 1], layers_pattern=["(([a-z.]+)+)+!"])
    yield settings(
        "pattern that needs all memory", target_modules="((((a{1,999}){1,999}){1,999}){1,999})" * 9
    )
    for layers in ("0", [0.5], [None], True, {"0": 1}):
        yield settings(f"layers {layers!r}", layers_to_transform=layers)
    yield settings("layers and a pattern", target_modules=".*q_proj", layers_to_transform=[0])
    yield settings("fewer targets than weights", target_modules=["q_proj"])
    yield settings("more targets than weights", target_modules=["q_proj", "v_proj", "o_proj"])


def other_kinds() -> Iterator[Hostile]:
    """Adapters that are no sum of low rank, or do not say what they are."""
    changes: dict[str, Any] = {
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [1, 2],
        "target_parameters": ["w"],
        "layer_replication": [[0, 1]],
        "alora_invocation_tokens": [5],
        "use_qalora": True,
        "megatron_config": {"a": 1},
        "a_setting_of_tomorrow": "on",
        "\x1b[31mred\x07": 1,
        "init_lora_weights": "pissa",
    }
    for key, value in changes.items():
        yield settings(f"setting {key!r}", **{key: value})
    for start in ("loftq", "olora", "corda", "lora_ga", "pissa_niter_4", "unknown", 7, ["pissa"], {}):
        yield settings(f"start {start!r}", init_lora_weights=start)
    for kind in ("IA3", "lora", "", None, 7, ["LORA"], "../LORA", "\x1b[2J"):
        yield settings(f"kind {kind!r}", peft_type=kind)
    for bias in ("some", True, 3, ["all"]):
        yield settings(f"bias {bias!r}", bias=bias)
    for enabled in (True, "yes", [1, 0, 1], [True, None], [True, False, True]):
        yield settings(f"enable_lora {enabled!r}", enable_lora=enabled)
    yield settings("AdaLoRA without its weights", peft_type="ADALORA", init_r=2)
    yield settings("AdaLoRA without a rank", peft_type="ADALORA")


def texts() -> Iterator[Hostile]:
    """Configurations that are no JSON, or not one that two readers would read alike."""
    sound = json.dumps(sound_config())
    inner = sound[1:-1]
    given: dict[str, bytes] = {
        "nothing": b"",
        "a brace": b"{",
        "a list": b"[1]",
        "a string": b'"LORA"',
        "a number": b"7",
        "null": b"null",
        "NaN": b'{"lora_dropout": NaN, ' + inner.encode() + b"}",
        "infinity": b'{"x": -Infinity, ' + inner.encode() + b"}",
        "a key twice": b'{"r": 64, ' + inner.encode() + b"}",
        "a byte order mark": b"\xef\xbb\xbf" + sound.encode(),
        "UTF-16": sound.encode("utf-16"),
        "Latin-1": sound.replace("someone", "möglich").encode("latin-1"),
        "zeros behind": sound.encode() + b"\0\0",
        "more behind": sound.encode() + b"{}",
        "a comment": b"/* safe */" + sound.encode(),
        "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
        "nested 500 deep": b'{"x": ' + b"[" * 500 + b"]" * 500 + b", " + inner.encode() + b"}",
        "an integer of 10,000 digits": b'{"x": ' + b"9" * 10_000 + b", " + inner.encode() + b"}",
        "twenty megabytes": b'{"x": "' + b"a" * 20_000_000 + b'", ' + inner.encode() + b"}",
        "a control sign": sound.replace("someone", "some\x01one").encode(),
        "a pickle": b"cos\nsystem\n(S'true'\ntR.",
    }
    for name, text in given.items():
        yield Hostile(f"configuration: {name}", lambda folder, _, t=text: (folder / CONFIG).write_bytes(t))
