#!/usr/bin/env bash
# Do the newest releases of everything still work? The contract tests with whatever pip takes today: run it weekly.
# On Linux plain torch is a CUDA build of several gigabytes; TORCH="torch==2.13.0" (or any other) keeps another one.
set -euo pipefail
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
echo "${TORCH:-}" >"$constraints"
bash "$(dirname "$0")/../.ci/contract" "$constraints"
