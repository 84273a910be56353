"""What a run left behind, read without a model: settings, metrics, evaluation, routing and plan."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsmixer.config.errors import UserError
from dsmixer.config.yaml_text import parse_yaml, read_text
from dsmixer.report.held_out_texts import EXAMPLES_FILE, HeldOutTexts, read_examples
from dsmixer.report.json_file import read_json

METRICS_FILE = "metrics.jsonl"
EVALUATION_KEYS = ("domain", "method", "metric", "value")


@dataclass(frozen=True)
class RoutingLoad:
    """Where the tokens of held-out data went. M routers, G domains, E experts.

    Attributes:
        routers: M module paths.
        experts, domains: E and G names.
        load: ``[M, G, E]``, share of a domain's tokens whose first choice is the expert.
        own_first: ``[M, G]``, share whose first choice is the domain's own expert; NaN where it has none.
        own_probability: ``[M, G]``, mean probability of that expert; NaN likewise, and where it is not known.
        entropy: ``[M]``, mean token entropy, nats; NaN where it is not known.
        expert_load: ``[M, E]``, share of all tokens whose first choice is the expert; of a run that did not
            keep it, the mean of ``load`` over domains.
        summary: means over routers and domains by name, those that are known.
    """

    routers: list[str]
    experts: list[str]
    domains: list[str]
    load: np.ndarray
    own_first: np.ndarray
    own_probability: np.ndarray
    entropy: np.ndarray
    expert_load: np.ndarray
    summary: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run folder's files; what is not there is empty or None.

    Attributes:
        path: the folder.
        config: the resolved recipe as plain mappings.
        metrics: rows of ``metrics.jsonl`` by stage, in the order of their steps.
        evaluation: rows of ``evaluation.json``.
        routing: ``routing.json``.
        plan: ``plan.json``.
        examples: ``examples.json``.
        config_text: ``config.yaml`` as it stands there.
        versions: of the libraries that trained, by name, from the newest checkpoint that is still there.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[int, list[dict[str, Any]]]
    evaluation: list[dict[str, Any]]
    routing: RoutingLoad | None
    plan: dict[str, Any]
    examples: HeldOutTexts | None = None
    config_text: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name, that of its folder where the settings say none."""
        return str(self.setting("run.name") or self.path.resolve().name)

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the settings; None where it is not there."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def series(self, stage: int, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric of one stage; NaN where a row has ``null`` or no such key."""
        rows = self.metrics.get(stage, [])
        steps = np.array([row["step"] for row in rows], dtype=float)
        return steps, np.array([_number(row.get(key)) for row in rows], dtype=float)


def read_run(folder: str | Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: it is no run folder (``config.yaml`` is missing), or one of its files is damaged.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        problem = "this is no run folder: it holds no config.yaml" if path.is_dir() else "no such folder"
        raise UserError(problem, where=str(path), fix="give the folder of a run, such as runs/NAME")
    config_path = path / "config.yaml"
    config_text = read_text(config_path, "configuration")
    config = parse_yaml(config_text, str(config_path)).value
    if not isinstance(config, dict):
        raise UserError("a configuration is a mapping of sections", where=str(config_path))
    metrics: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(read_metrics(path / METRICS_FILE), key=lambda row: (row["stage"], row["step"])):
        metrics.setdefault(row["stage"], []).append(row)
    return RunFolder(
        path=path,
        config=config,
        metrics=metrics,
        evaluation=_read_evaluation(path / "evaluation.json"),
        routing=_read_routing(path / "routing.json"),
        plan=read_json(path / "plan.json") or {},
        examples=read_examples(path / EXAMPLES_FILE),
        config_text=config_text,
        versions=_versions(path),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, in file order; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = (_metrics_row(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [row for row in rows if row is not None]


def _metrics_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("stage"), int) and isinstance(row.get("step"), int)
    return row if whole else None


def _versions(path: Path) -> dict[str, str]:
    """Of the newest checkpoint; one that is being written, or is damaged, says nothing."""
    for state in sorted(path.glob("checkpoints/stage*/step-*/state.json"), reverse=True):
        try:
            found = json.loads(state.read_text(encoding="utf-8")).get("versions")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, dict):
            return {str(name): str(version) for name, version in found.items()}
    return {}


def _read_evaluation(path: Path) -> list[dict[str, Any]]:
    value = read_json(path)
    if value is None:
        return []
    rows = value.get("rows")
    if not isinstance(rows, list):
        raise UserError("no list called rows", where=str(path), fix="evaluate the run again")
    for index, row in enumerate(rows):
        absent = [key for key in EVALUATION_KEYS if not isinstance(row, dict) or key not in row]
        if absent:
            raise UserError(
                f"no {absent[0]} in this row", where=f"{path}: rows.{index}", fix="evaluate the run again"
            )
    return rows


def _read_routing(path: Path) -> RoutingLoad | None:
    value = read_json(path)
    if value is None:
        return None
    names = [[str(name) for name in value.get(key) or ()] for key in ("routers", "experts", "domains")]
    routers, experts, domains = names
    shape = (len(routers), len(domains), len(experts))
    load, own_first, own_probability, entropy, expert_load = (
        _array(value.get(key), of, f"{path}: {key}")
        for key, of in {
            "load": shape,
            "own_first_share": shape[:2],
            "own_probability": shape[:2],
            "entropy": shape[:1],
            "expert_load": (shape[0], shape[2]),
        }.items()
    )
    if not np.isfinite(expert_load).any():
        expert_load = mean_of(load, 1)
    summary = value.get("summary")
    means = {key: _number(mean) for key, mean in summary.items()} if isinstance(summary, dict) else {}
    known = {key: mean for key, mean in means.items() if math.isfinite(mean)}
    return RoutingLoad(
        routers, experts, domains, load, own_first, own_probability, entropy, expert_load, known
    )


def mean_of(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over what is a number; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of a mean over nothing
        return np.asarray(np.nanmean(values, axis=axis))


def _array(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Nested lists of numbers and nulls (NaN) as an array; where it is missing, NaN everywhere."""
    if value is None:
        return np.full(shape, np.nan)
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):
        array = None
    if array is None or (array.shape != shape and array.size != math.prod(shape)):
        raise UserError(f"not numbers of the shape {list(shape)}", where=where, fix="evaluate the run again")
    return array.reshape(shape)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def numbers(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """The finite values of a key in rows."""
    values = np.array([_number(row.get(key)) for row in rows], dtype=float)
    return values[np.isfinite(values)]
