#!/usr/bin/env bash
# Sets up .venv, then runs the tests. Arguments go to pytest: scripts/test.sh tests/packs
#
#   scripts/test.sh                     the whole default suite: all but what is marked slow
#   scripts/test.sh quick [FOLDER ...]  under a minute: tests that start no process, of the folders or of those that take least
#   scripts/test.sh -m slow             the slow tests; -m "" runs everything
#
# The folders of tests mirror those of the package; beside them, tests/ranks, cases and slurm start real processes. Five files of
# tests run at a time, since many of them wait for something; one at a time: scripts/test.sh -n 0
set -euo pipefail
# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv test,dev,docs
unset PYTHONDONTWRITEBYTECODE # tests begin Python some hundred times: what is compiled once need not be compiled again

cd "$REPOSITORY"
if [[ "${1:-}" == quick ]]; then
    shift
    (($#)) || set -- tests/{analysis,cli,distributed,output,packs,placement,system,telemetry} tests/test_{architecture,config,layout}.py
    set -- -m "not slow and not processes" "$@"
fi
exec "$VENV/bin/python" -m pytest -n 5 --dist loadfile --no-loadscope-reorder "$@"
