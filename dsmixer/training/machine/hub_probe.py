"""Asks the hub for models and data sets: ``python -m dsmixer.training.machine.hub_probe NAMES_AS_JSON``.

Runs in a process of its own: what the network raises ends it, and is its last word.
"""

from __future__ import annotations

import json
import sys

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

SECONDS = 5.0


def ask(kind: str, name: str, revision: str) -> tuple[str, str] | None:
    """What keeps this user from a model or data set, and the fix; None: nothing."""
    try:
        if kind == "model":  # a file, not the page about it: a gated model shows that to everybody
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision or None), timeout=SECONDS)
        else:
            HfApi().dataset_info(name, revision=revision or None, timeout=SECONDS)
    except GatedRepoError:
        return "its owner wants an agreement first", "accept it on the page of the model, then: hf auth login"
    except RepositoryNotFoundError:
        return "the hub knows none of this name", "correct it; if it is private: hf auth login"
    except HfHubHTTPError as error:
        return str(error).splitlines()[0], "check its revision, and the state of the hub"
    return None


if __name__ == "__main__":
    for kind, name, revision in json.loads(sys.argv[1]):
        trouble, fix = ask(kind, name, revision) or (None, None)
        print(json.dumps({"name": name, "trouble": trouble, "fix": fix}), flush=True)
