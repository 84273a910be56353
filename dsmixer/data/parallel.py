"""The threads of fast tokenizers, which their library takes or leaves by a variable of the environment.

It looks at the variable in every call. Where nothing is said it takes threads, and complains in each child
that the process forks afterwards; so a run says that it takes none, but for a while.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "TOKENIZERS_PARALLELISM"
SERIAL = "off"
"""What a run says; a user's own "false" is another word."""


@contextmanager
def tokenizer_threads() -> Iterator[None]:
    """Let fast tokenizers encode a batch's texts on all cores; a user who has said something keeps it."""
    before = os.environ.get(VARIABLE)
    if before not in (None, SERIAL):
        yield
        return
    os.environ[VARIABLE] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
