"""``python -m dsmixer``: the command line of the interpreter at hand."""

from __future__ import annotations

import sys

from dsmixer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
