"""What looks like a secret is refused before anything is written, and is not in the message."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmixer.config.checks import check_recipe
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe

RECIPE = """
base: {{model: {model}}}
data:
  domains:
    - {{name: law, train: {train}}}
mixer: {{targets: [q]}}
stage2: {{enabled: false}}
"""


def check(folder: Path, model: str = "org/base", train: str = "org/law") -> None:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, train=train))
    check_recipe(load_recipe(str(path), []))


@pytest.mark.parametrize(
    "secret",
    [
        "https://me:pass0rd@host/law.jsonl",
        "https://host/law.jsonl?X-Amz-Signature=0123456789abcdef",
        "https://host/law.jsonl?access_token=0123",
        "hf_" + "a1B2" * 8,
        "github_pat_" + "a1B2" * 10,
        "sk-" + "a1B2" * 10,
        "sk-ant-api03-" + "a1B2-c3_D4" * 9,
        "sk-proj-a1-" + "B2_c3-D4" * 6,
        "sk-svcacct-" + "a1B2" * 12,
        "AKIA" + "ABCD1234" * 2,
        "ASIA" + "ABCD1234" * 2,
        "xoxb-123456789012-123456789012-" + "a1B2" * 6,
        "xoxe.xoxp-1-" + "a1B2" * 12,
    ],
)
def test_a_secret_is_refused_by_its_key_and_not_repeated(tmp_path: Path, secret: str) -> None:
    for given in ({"train": f'"{secret}"'}, {"model": f'"{secret}"'}):
        with pytest.raises(UserError, match="looks like a password or an access token") as refused:
            check(tmp_path, **given)
        assert secret not in str(refused.value)
        assert ("data.domains.0.train" if "train" in given else "base.model") in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "hf_team/risky-business_7b",
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        "models/hf_Meta-Llama-3-8B-Instruct-long-name",
        "data/sk-learn-documentation-of-all-versions-v2",
        "org/tokens-and-keys@v1.0",
        "data/sk-proj-documentation-of-every-version-2024",
        "models/sk-ant-colony-optimization-instructions-7b",
        "team/sk-admin-Handbook-Of-All-Departments-Cleaned",
        "org/xoxo-letters-of-the-nineties",
        "data/ASIA-PACIFIC-NEWS-2024",
    ],
)
def test_ordinary_names_are_none(tmp_path: Path, name: str) -> None:
    check(tmp_path, model="org/base", train=name)
