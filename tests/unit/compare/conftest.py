"""Comparisons on disk whose model and data files exist, though nothing reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

COMPARISON = """\
comparison:
  name: losses
  title: Losses on the routers
  seeds: [0, 1]
  variants:
    - {{name: RSL, set: {{stage2.rsl.alpha: 0.2}}}}
    - name: GMoE
      set:
        stage2.routing_loss: gmoe
  methods: [own, uniform]
run: {{dir: {folder}/runs}}
base: {{model: {model}}}
data:
  domains:
    - {{name: law, train: {data}, test: {data}}}
    - {{name: chess, train: {data}, test: {data}}}
mixer: {{rank: 8, alpha: 16}}
stage2:
  data: {{max_examples: 30}}
  rsl: {{alpha: 0.1, ramp: 0.5}}
scales:
  small:
    comparison: {{seeds: [7]}}
    mixer: {{rank: 4}}
    data:
      domains:
        - {{name: code, train: {data}}}
        - {{name: chess, train: {data}}}
  broken:
    mixer: {{rankk: 4}}
"""


@pytest.fixture
def comparison_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the comparison with replacements of parts of its text, and returns its path."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    model.mkdir()
    data.write_text('{"prompt": "a", "completion": "b"}\n')

    def write(*replacements: tuple[str, str]) -> Path:
        text = COMPARISON.format(model=model, data=data, folder=tmp_path)
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "losses.yaml"
        path.write_text(text)
        return path

    return write
