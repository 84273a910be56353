"""The model card of a mixture folder, and what cards of adapters have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmixer import __version__
from dsmixer.model.mixer_config import MixerConfig

HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$|^\w[\w-]*$")
TAGS = ("dsmixer", "peft", "lora", "mixture-of-experts")

USE = "## Use"

METRICS = {
    "loss": "held-out loss, nats a target token",
    "accuracy": "accuracy by log-likelihood of the choice",
    "accuracy_norm": "accuracy by log-likelihood per byte of the choice",
    "exact_match": "exact match of written answers",
}
"""Headings of the evaluation's tables; another metric goes by its name."""

LIMITS = (
    "The license field is what the publisher wrote; what may be done with the weights depends on the base "
    "model's license and on the data, which this card does not judge.",
    "Outside the domains above nothing was measured, safety and bias included.",
    "The routers choose among the experts by the token: what one expert has learned can show in any answer.",
)

USAGE = """```python
from dsmixer import load_mixture, route_to

model, tokenizer = load_mixture("PATH_OF_THIS_FOLDER")
inputs = tokenizer("...", return_tensors="pt")
model.generate(**inputs)                      # routed by the routers
with route_to(model, "{expert}"):             # one expert, weight 1
    model.generate(**inputs)
```

With PEFT, the whole mixture:

```python
import dsmixer.peft
from peft import {auto_peft}

model = {auto_peft}.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""

ONE_EXPERT = """
Each folder under `experts/` is a plain PEFT LoRA adapter and loads by itself:

```python
from peft import PeftModel
from transformers import {auto}

base_model = {auto}.from_pretrained("{base}")
PeftModel.from_pretrained(base_model, "PATH_OF_THIS_FOLDER/experts/{expert}")
```
"""

AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
"""transformers' class of a base, by PEFT's task type."""


LICENSE = re.compile(r"\A---\n(?:.*\n)*?license: *(?P<license>[\w.-]+) *\n")


def license_of(card: Path) -> str | None:
    """The licence that a card names; None where there is no card, or it names none."""
    try:
        found = LICENSE.match(card.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return found["license"] if found else None


def model_card(facts: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        facts: what is known; all keys but ``experts`` may be absent. ``experts``: a list of ``{"name",
            "rank", "alpha"}``. ``base``: name or path. ``targets``, ``routing``, ``dsmixer_version``.
            ``domains``: a list of ``{"name", "expert", "train", "test"}`` with counts of examples.
            ``training``: settings by stage, ``{"stage 1": {"steps": 100, …}, …}``.
            ``evaluation``: ``{"rows": [{"domain", "method", "metric", "value", "num_examples"}]}``.
            ``pictures``: names of PNG files beside the card, of where the routers send tokens.
            ``history``: what was done to the mixture after training, sentences.
            ``limits``: what is known to be missing, sentences.
            ``license``: an identifier of the hub. ``task_type``: PEFT's, ``CAUSAL_LM`` if absent.
            ``not_applied``: why PEFT can't apply an expert's folder, by projection. ``in_folders``: whether
            each expert has a folder of its own, which it has if absent.
    """
    parts = [
        front_matter(facts),
        "# A mixture of LoRA experts\n",
        _summary(facts),
        _experts(facts["experts"]),
    ]
    if facts.get("domains"):
        parts.append(_domains(facts["domains"]))
    if facts.get("training"):
        parts.append(_training(facts["training"]))
    if facts.get("history"):
        parts.append("## Afterwards\n\n" + _listed(facts["history"]))
    rows = (facts.get("evaluation") or {}).get("rows") or []
    parts.extend(_metric(metric, rows) for metric in dict.fromkeys(row["metric"] for row in rows))
    if facts.get("pictures"):
        shown = [f"![Where the routers send held-out tokens]({name})\n" for name in facts["pictures"]]
        parts.append("## Routing\n\n" + "\n".join(shown))
    parts.append("## Limits\n\n" + _listed([*_missing(facts, rows), *facts.get("limits", ()), *LIMITS]))
    parts.append(f"{USE}\n\n{usage(facts)}")
    return "\n".join(parts)


def facts_of_mixers(config: MixerConfig) -> dict[str, Any]:
    """What a card says of experts, projections and routing."""
    experts = [
        {"name": name, "rank": rank, "alpha": alpha}
        for name, rank, alpha in zip(config.experts, config.rank_list, config.alpha_list, strict=True)
    ]
    routing = config.default_routing()
    mode = f"{routing.mode}, K={routing.top_k}" if routing.mode in ("topk", "hard_soft") else routing.mode
    return {
        "dsmixer_version": __version__,
        "targets": config.targets,
        "routing": mode,
        "experts": experts,
    }


def usage(facts: Mapping[str, Any]) -> str:
    """How a mixture is loaded: code that runs once its path is in it.

    Args:
        facts: as ``model_card`` has them.
    """
    text, not_applied, in_folders = USAGE, facts.get("not_applied"), facts.get("in_folders", True)
    if in_folders and not_applied:
        reasons = "; ".join(f"`{name}` {reason}" for name, reason in not_applied.items())
        text += f"\nThe folders under `experts/` are not for PEFT alone: {reasons}.\n"
    elif in_folders:
        text += ONE_EXPERT
    auto = AUTO_CLASSES.get(facts.get("task_type") or "", "AutoModelForCausalLM")
    named = {
        "expert": facts["experts"][0]["name"],
        "auto": auto,
        "auto_peft": auto.replace("AutoModel", "AutoPeftModel"),
        "base": str(facts.get("base") or "BASE"),
    }
    for key, value in named.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def front_matter(facts: Mapping[str, Any], tags: Sequence[str] = TAGS) -> str:
    """What the hub reads of a card.

    Args:
        facts: ``license`` and ``base``; both may be absent.
        tags: of the hub.
    """
    lines = [
        "---",
        "library_name: peft",
        f"license: {facts.get('license') or 'other'}",
        f"tags: [{', '.join(tags)}]",
    ]
    if is_hub_id(facts.get("base")):
        lines += [f"base_model: {facts['base']}", "base_model_relation: adapter"]
    return "\n".join([*lines, "---", ""])


def is_hub_id(base: object) -> bool:
    """Whether a base is named as on the hub: a path of the machine it was trained on is refused there."""
    return isinstance(base, str) and HUB_ID.match(base) is not None and not Path(base).exists()


def _missing(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not evaluated, by the facts themselves."""
    scored = {row["domain"] for row in rows}
    left = [domain["name"] for domain in facts.get("domains") or () if domain["name"] not in scored]
    if not rows:
        return ["Nothing was evaluated."]
    return [f"Not evaluated: {', '.join(left)}."] if left else []


def _listed(sentences: Sequence[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _training(stages: Mapping[str, Mapping[str, object]]) -> str:
    settings = dict.fromkeys(key for values in stages.values() for key in values)
    rows = [[key, *(stage.get(key, "") for stage in stages.values())] for key in settings]
    return "## Training\n\n" + plain_table(["", *stages], rows)


def _summary(facts: Mapping[str, Any]) -> str:
    num = len(facts["experts"])
    experts = f"{num} low-rank expert{'s' if num > 1 else ''}"
    base = facts.get("base") or "?"
    linked = f"[`{base}`](https://huggingface.co/{base})" if is_hub_id(base) else f"`{base}`"
    text = f"{experts} and token-level routers on {linked}"
    if facts.get("targets"):
        text += f", on the projections {', '.join(f'`{target}`' for target in facts['targets'])}"
    if facts.get("routing"):
        text += f", routed by `{facts['routing']}`"
    version = facts.get("dsmixer_version")
    return f"{text}. Made with dsmixer{f' {version}' if version else ''}.\n"


def _experts(experts: Sequence[Mapping[str, Any]]) -> str:
    rows = [[expert["name"], expert["rank"], f"{expert['alpha']:g}"] for expert in experts]
    return "## Experts\n\n" + plain_table(["expert", "rank", "alpha"], rows)


def _domains(domains: Sequence[Mapping[str, Any]]) -> str:
    keys = ("name", "expert", "train", "test")
    rows = [[domain.get(key, "") for key in keys] for domain in domains]
    return "## Domains\n\n" + plain_table(["domain", "expert", "training examples", "test examples"], rows)


def _metric(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    own = [row for row in rows if row["metric"] == metric]
    methods = list(dict.fromkeys(row["method"] for row in own))
    cells = {(row["domain"], row["method"]): f"{row['value']:.4f}" for row in own}
    domains = dict.fromkeys(row["domain"] for row in own)
    body = [[domain, *(cells.get((domain, method), "") for method in methods)] for domain in domains]
    return f"## Evaluation: {METRICS.get(metric, metric)}\n\n" + plain_table(["domain", *methods], body)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def expert_card(facts: Mapping[str, Any]) -> str:
    """The card of one expert that was taken out of a mixture.

    Args:
        facts: ``expert``, ``rank``, ``num_projections``, and as far as known ``base`` and ``license``.
    """
    text = (
        f"The expert `{facts['expert']}` of a mixture on `{facts.get('base') or '?'}`, alone: a plain PEFT "
        f"LoRA adapter, rank {facts['rank']}, {facts['num_projections']} projections. Made with dsmixer.\n"
    )
    tags = [tag for tag in TAGS if tag != "mixture-of-experts"]
    limits = "## Limits\n\n" + _listed(["Its figures are on the mixture's card.", LIMITS[0]])
    return "\n".join([front_matter(facts, tags), f"# {facts['expert']}\n", text, limits])
