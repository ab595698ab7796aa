#!/usr/bin/env bash
# Format, lint, types and tests. Arguments go to pytest: ./run_tests.sh tests/unit -k config
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment dev
cd "$root"

# The tests of one run share a cache of compiled kernels, which is deleted at the end.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pyright --pythonpath "$(command -v "$PYTHON")"
"$PYTHON" -m pytest -n 2 "$@"
