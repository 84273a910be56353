#!/usr/bin/env bash
# All checks that a change has to pass: bash launch/test.sh [arguments of pytest]
#
# Makes .venv with the test extras; ruff, mypy, then the tests on the CPU, without a network. A path among the
# arguments takes the place of the whole test tree: bash launch/test.sh tests/unit/data -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

prepare_environment test
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

began=$SECONDS
# what DeepSpeed compiles at its first use on a CPU is compiled while the checks below keep the other core busy
python -c 'from dsmixer.training.world import join_world; join_world(60.0)' >/dev/null 2>&1 &
ruff check .
ruff format --check --quiet . || fail "some files are not formatted" "run: .venv/bin/ruff format ."
mypy dsmixer
wait # the tests say what is wrong where that did not work

# tests that start processes of their own run one after another
paths=()
for folder in dist parity real reliability; do
    if [[ -n "$(find "tests/$folder" -name 'test_*.py' -print -quit 2>/dev/null)" ]]; then
        paths+=("tests/$folder")
    fi
done
if [[ $# -eq 0 ]]; then
    python -m pytest -q -ra --durations=10 -n 2 --dist loadfile tests/unit
    python -m pytest -q -ra --durations=10 "${paths[@]}"
else
    for argument in "$@"; do
        if [[ -e "${argument%%::*}" ]]; then
            paths=()
        fi
    done
    [[ ${#paths[@]} -gt 0 ]] && paths+=(tests/unit)
    python -m pytest -q -ra --durations=10 ${paths[@]+"${paths[@]}"} "$@"
fi
echo "all checks: $((SECONDS - began)) s"
