#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them: linter, type checker, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plot]'
.venv/bin/ruff check .
.venv/bin/mypy
OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
