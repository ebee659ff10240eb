#!/usr/bin/env bash
# Set up and run the checks and tests.
#   ./run_tests.sh              everything that runs without a GPU
#   ./run_tests.sh goldens      compare with recorded figures and print a table by topic
#   ./run_tests.sh gpu          the tests that need NVIDIA GPUs, with the current Python
#   ./run_tests.sh -k flux      further arguments go to pytest
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

if [ "${1:-}" = gpu ]; then
  shift
  exec python3 -m pytest tests/gpu -m "gpu or multigpu" "$@"
fi
./setup_environment.sh tests
export PYTHONHASHSEED=${PYTHONHASHSEED:-random}
if [ "${1:-}" = goldens ]; then
  shift
  exec .venv/bin/python -m tests.goldens.report "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"
# Tests without servers and browsers run in two processes. Then the tests that share servers run in this shell, and those
# of browsers, packs, training and starts in the background; the output of the latter is shown at the end.
own_servers=(tests/e2e/test_{network,processes,restart}.py)
second=(tests/demo tests/packs tests/web)
.venv/bin/python -m pytest -n 2 --dist loadfile --ignore=tests/e2e "${second[@]/#/--ignore=}"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
.venv/bin/python -m pytest -p no:cacheprovider "${own_servers[@]}" "${second[@]}" >"$output" 2>&1 &
background=$!
status=0
.venv/bin/python -m pytest tests/e2e "${own_servers[@]/#/--ignore=}" || status=$?
wait "$background" || status=$?
cat "$output"
exit "$status"
