"""The main job: ``deepspeed [launcher flags] launch/train.py --config RECIPE.yaml [key=value ...]``."""

from __future__ import annotations

import sys

from dsmixer.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
