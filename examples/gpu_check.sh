#!/bin/sh
# Check and measure the pipeline on a GPU in one call, on a machine without network: `sh examples/gpu_check.sh --help`.
# Packages that the machine lacks travel as wheels in .wheels/ at the root of the repository; they are unpacked into a
# folder of this run. PYTHON is the interpreter with torch (default: python3).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ls .wheels/*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .wheels/*.whl
    PYTHONPATH=$PYTHONPATH:$site
fi
export PYTHONPATH
"$python" -m examples.gpu_check "$@"
