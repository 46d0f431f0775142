#!/usr/bin/env bash
# From a fresh clone: make a virtual environment, install with what the tests need, run them.
#
#   scripts/test.sh            all tests
#   scripts/test.sh --quick    in a minute, after each change: what is decided, and whether verify
#                              sees wrong bytes, without the tests marked slow; or of the folders
#                              that are named, as in scripts/test.sh --quick tests/writing
#
# Other arguments go to pytest: scripts/test.sh tests/planning/test_fusion.py -k scales
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --quick ]; then
    shift
    [ $# -gt 0 ] || set -- tests/planning tests/verifying/test_structure.py
    set -- -m "not slow" "$@"
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
if [ ! .venv/installed -nt pyproject.toml ]; then
    .venv/bin/python -m pip install --quiet --editable '.[dev]'
    touch .venv/installed
fi
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 "$@"
