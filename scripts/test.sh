#!/usr/bin/env bash
# From a fresh clone: make a virtual environment, install with what the tests need, run them.
#
#   scripts/test.sh            all tests
#   scripts/test.sh --quick    without those marked slow: in a minute, after each change
#
# Other arguments go to pytest: scripts/test.sh tests/planning/test_fusion.py -k scales
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --quick ]; then
    shift
    set -- -m "not slow" "$@"
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
if [ ! .venv/installed -nt pyproject.toml ]; then
    .venv/bin/python -m pip install --quiet --editable '.[dev]'
    touch .venv/installed
fi
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 "$@"
