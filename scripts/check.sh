#!/usr/bin/env bash
# Formatter, linter, types and tests, here and in CI alike. `check.sh static` leaves the tests out.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
# Some images forbid it; but compiled once, the package and the checks of its calls load 7 s sooner in each process.
unset PYTHONDONTWRITEBYTECODE
step() { printf '\n== %s\n' "$*"; }

step format
"$python" -m ruff format --check .
step lint
"$python" -m ruff check .
step types
"$python" -m mypy
[[ ${1:-} != static ]] || exit 0

step "environment of vLLM"
PYTHON=$python scripts/vllm_env.sh ||
    echo "The environment of vLLM could not be built: the tests that need it will be skipped." >&2

step tests
# Every test computes on one thread, so there is a process for each core; a file's tests stay in one, for what they share.
"$python" -m pytest --numprocesses "${TEST_PROCESSES:-auto}" --dist loadfile --no-loadscope-reorder --durations 25

# Both ends of the supported range: the newest is in .venv, the oldest is laid over it from a folder that all clones share.
oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
key=$(printf '%s\n' "$oldest" "$("$python" -V)" | cat constraints.txt - | cksum | tr ' ' -)
overlay=${XDG_CACHE_HOME:-$HOME/.cache}/ultrafuser/transformers-$oldest-$key
if [[ ! -d $overlay ]]; then
    step "installing transformers $oldest"
    mkdir -p "$(dirname "$overlay")"
    partial=$(mktemp -d "$overlay.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    # Without dependencies: the oldest asks for the same ones as the newest, and import checks their versions.
    "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$partial/packages" "transformers==$oldest"
    # Renamed when whole. If another clone was faster, its copy is as good.
    "$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$partial/packages" "$overlay" 2>/dev/null || [[ -d $overlay ]]
fi

step "model tests on transformers $oldest"
shopt -s nullglob
tests=(tests/test_model*.py tests/test_generate*.py tests/test_checkpoint*.py)
((${#tests[@]})) || { echo "no model tests found" >&2; exit 1; }
ULTRAFUSER_EXPECT_TRANSFORMERS=$oldest PYTHONPATH=$overlay "$python" -m pytest --numprocesses "${TEST_PROCESSES:-auto}" -m "not slow" -p no:cacheprovider "${tests[@]}"
