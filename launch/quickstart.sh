#!/usr/bin/env bash
# From nothing to a trained mixture and its report, on two processes: bash launch/quickstart.sh [section.key=value ...]
#
# Makes .venv, installs the tested set, trains both stages on the embedded base and domains, evaluates, and
# says where the report lies. It needs no GPU, and no network beyond the package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

readonly RECIPE=launch/recipes/quickstart.yaml

prepare_environment base
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# two processes want a GPU each; with fewer the small model trains on the CPU
if (($(num_gpus) < 2)); then
    export DS_ACCELERATOR=cpu
fi
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    cores=$(num_cores)
    export OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1))
fi

folder="$(python - "$RECIPE" "$@" <<'PYTHON'
import sys
from dsmixer.config.errors import UserError
from dsmixer.config.recipe import load_recipe

try:
    run = load_recipe(sys.argv[1], sys.argv[2:]).recipe.run
except UserError as error:
    sys.exit(print(f"dsmixer: error: {error}", file=sys.stderr) or 2)
print(f"{run.dir}/{run.name}")
PYTHON
)"
began=$SECONDS
deepspeed --num_accelerators 2 --master_port "$(free_port)" launch/train.py --config "$RECIPE" "$@"
echo "training and evaluation: $((SECONDS - began)) s"
echo "the report: $PWD/$folder/report/index.html"
