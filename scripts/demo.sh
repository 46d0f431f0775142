#!/usr/bin/env bash
# From a fresh clone: make a virtual environment, install, fuse a model that the demo makes itself.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --editable .
exec .venv/bin/gguf-fuse demo "$@"
