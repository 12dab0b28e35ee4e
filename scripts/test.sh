#!/usr/bin/env bash
# Sets up .venv, checks style, types and shell scripts (check.sh), then runs the tests.
# Arguments go to pytest: scripts/test.sh tests/packs
# The folders of tests mirror those of the package; beside them, tests/ranks, cases and slurm start real processes.
# Slow tests are left out: scripts/test.sh -m slow runs them, -m "" runs everything. Two files of tests run at a time, since most
# of the time they wait for processes that start; one at a time: scripts/test.sh -n 0
set -euo pipefail
# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv test,dev,docs

cd "$REPOSITORY"
scripts/check.sh
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
