# Sourced by quickstart.sh and test.sh from the root of the repository: makes .venv and installs the tested set.

readonly VENV="$PWD/.venv"
readonly STAMP="$VENV/.installed"

fail() {
    echo "dsmixer: $1" >&2
    echo "  Fix: $2" >&2
    exit 2
}

# The first Python that is new enough and can make environments; PYTHON=... names one.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

check_compiler() {
    command -v "${CXX:-g++}" >/dev/null || fail \
        "there is no C++ compiler (${CXX:-g++}); DeepSpeed builds a small extension when it starts" \
        "install one, such as: apt-get install g++ (or set CXX)"
}

# What an installation depends on: a change of any of it installs again.
fingerprint() {
    cat constraints.txt pyproject.toml launch/environment.sh | "$VENV/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())'
}

quiet_pip() {
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt "$@" || fail \
        "the installation failed: pip install $*" \
        "see what pip says above; it needs a package index (PIP_INDEX_URL names another one)"
}

# install_package EXTRAS: EXTRAS is "base" or "test"; what "test" has installed serves "base" too.
install_package() {
    local wanted package="."
    [[ "$1" == test ]] && package=".[test]"
    wanted="$(fingerprint)"
    if [[ -f "$STAMP" ]] && grep -qxE "$wanted ($1|test)" "$STAMP"; then
        return
    fi
    rm -f "$STAMP"
    local began=$SECONDS
    echo "installing the tested set of packages into .venv (minutes the first time)"
    # torch comes first: the build of DeepSpeed looks for it
    quiet_pip "$(grep -E '^setuptools==' constraints.txt)" "$(grep -E '^torch==' constraints.txt)"
    quiet_pip --no-build-isolation -e "$package"
    echo "$wanted $1" >"$STAMP"
    echo "installation: $((SECONDS - began)) s"
}

# prepare_environment EXTRAS: .venv exists, holds the package, and comes first on PATH.
prepare_environment() {
    local python
    check_compiler
    unset VIRTUAL_ENV PYTHONHOME CONDA_PREFIX
    if [[ ! -x "$VENV/bin/python" ]]; then
        python="$(find_python)" || fail \
            "there is no Python 3.11 or later with venv (tried: ${PYTHON:-python3, python3.13, 3.12, 3.11})" \
            "install one, such as: apt-get install python3.11-venv; PYTHON=/path/to/python names another"
        "$python" -m venv "$VENV"
    fi
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail \
        ".venv has a Python before 3.11" "remove the folder .venv, and run this again"
    install_package "$1"
    # the launcher and its children must find this Python, and torch the ninja that builds extensions
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    # one build of the extension for each environment: sharing the cache of another one builds it again and again
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
    ninja --version >/dev/null 2>&1 || fail \
        "ninja, which builds DeepSpeed's extension, does not run" "remove the folder .venv, and run this again"
}

num_cores() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

num_gpus() {
    python -c 'import torch; print(torch.cuda.device_count())'
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
