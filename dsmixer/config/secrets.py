"""No secret in a recipe: its text is copied into the run folder, the checkpoints and the report."""

from __future__ import annotations

import re

from dsmixer.config.errors import UserError
from dsmixer.config.recipe import LoadedRecipe, flatten

SECRETS = (
    re.compile(r"://[^/\s@]*:[^/\s@]+@"),  # a password in an address
    re.compile(r"[?&][\w-]*(token|key|secret|signature|password)[\w-]*=[^&\s]+", re.IGNORECASE),
    re.compile(r"\b(hf_|gh[opsu]_|github_pat_|sk-)[A-Za-z0-9]\w{29,}"),
    # hyphens too, so both a digit and a capital letter are asked for: no name of a folder has them all
    re.compile(r"\bsk-(ant|proj|svcacct|admin)-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{30,}"),
    re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    re.compile(r"\bxox[a-z]-\d[\w-]{9,}"),
    re.compile(r"\bA[KS]IA[A-Z0-9]{16}\b"),
)


def check_no_secrets(loaded: LoadedRecipe) -> None:
    """Refuse a recipe with what looks like a password or an access token.

    Raises:
        UserError: names the key, and not the value.
    """
    for key, value in flatten(loaded.recipe.model_dump(mode="json")):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(pattern.search(text) for pattern in SECRETS):
                raise UserError(
                    "this looks like a password or an access token, and recipes are copied into run folders",
                    where=loaded.where(key),
                    fix="log in by hf auth login or set HF_TOKEN; for other places, fetch the file first",
                )
