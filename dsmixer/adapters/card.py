"""The model card of a mixture folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$|^[\w-]+$")

USAGE = """```python
from dsmixer import load_mixture, route_to

model, tokenizer = load_mixture("PATH_OF_THIS_FOLDER")
inputs = tokenizer("...", return_tensors="pt")
model.generate(**inputs)                      # routed by the routers
with route_to(model, "{expert}"):             # one expert, weight 1
    model.generate(**inputs)
```

Each folder under `experts/` is a plain PEFT LoRA adapter and loads by itself:

```python
from peft import PeftModel

PeftModel.from_pretrained(base_model, "PATH_OF_THIS_FOLDER/experts/{expert}")
```
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        facts: what is known; all keys but ``experts`` may be absent. ``experts``: a list of ``{"name",
            "rank", "alpha"}``. ``base``: name or path. ``targets``, ``routing``, ``dsmixer_version``.
            ``domains``: a list of ``{"name", "expert", "train", "test"}`` with counts of examples.
            ``evaluation``: ``{"rows": [{"domain", "method", "metric", "value", "num_examples"}]}``.
            ``license``: an identifier.
    """
    parts = [
        _front_matter(facts),
        "# A mixture of LoRA experts\n",
        _summary(facts),
        _experts(facts["experts"]),
    ]
    if facts.get("domains"):
        parts.append(_domains(facts["domains"]))
    rows = (facts.get("evaluation") or {}).get("rows") or []
    parts.extend(_metric(metric, rows) for metric in dict.fromkeys(row["metric"] for row in rows))
    parts.append("## Use\n\n" + USAGE.replace("{expert}", facts["experts"][0]["name"]))
    return "\n".join(parts)


def _front_matter(facts: Mapping[str, Any]) -> str:
    lines = [
        "---",
        f"license: {facts.get('license') or 'other'}",
        "tags: [dsmixer, peft, lora, mixture-of-experts]",
    ]
    base = str(facts.get("base") or "")
    # a path of the machine it was trained on is no model id, and the hub refuses it
    if HUB_ID.match(base):
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---", ""])


def _summary(facts: Mapping[str, Any]) -> str:
    num = len(facts["experts"])
    experts = f"{num} low-rank expert{'s' if num > 1 else ''}"
    text = f"{experts} and token-level routers on `{facts.get('base') or '?'}`"
    if facts.get("targets"):
        text += f", on the projections {', '.join(f'`{target}`' for target in facts['targets'])}"
    if facts.get("routing"):
        text += f", routed by `{facts['routing']}`"
    version = facts.get("dsmixer_version")
    return f"{text}. Made with dsmixer{f' {version}' if version else ''}.\n"


def _experts(experts: Sequence[Mapping[str, Any]]) -> str:
    rows = [[expert["name"], expert["rank"], f"{expert['alpha']:g}"] for expert in experts]
    return "## Experts\n\n" + _table(["expert", "rank", "alpha"], rows)


def _domains(domains: Sequence[Mapping[str, Any]]) -> str:
    keys = ("name", "expert", "train", "test")
    rows = [[domain.get(key, "") for key in keys] for domain in domains]
    return "## Domains\n\n" + _table(["domain", "expert", "training examples", "test examples"], rows)


def _metric(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    own = [row for row in rows if row["metric"] == metric]
    methods = list(dict.fromkeys(row["method"] for row in own))
    cells = {(row["domain"], row["method"]): f"{row['value']:.4f}" for row in own}
    domains = dict.fromkeys(row["domain"] for row in own)
    body = [[domain, *(cells.get((domain, method), "") for method in methods)] for domain in domains]
    return f"## Evaluation: {metric}\n\n" + _table(["domain", *methods], body)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
