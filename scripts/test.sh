#!/usr/bin/env bash
# From a fresh clone: make a virtual environment, install with what the tests need, run them.
# Arguments go to pytest: scripts/test.sh tests/test_fusion.py -k scales
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[dev]'
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 "$@"
