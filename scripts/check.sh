#!/usr/bin/env bash
# Checks style, types and shell scripts. Every check runs, even after one fails: a line for each, exit code 1 if any failed.
# The tools are those of $VENV, which scripts/test.sh sets up, or else those on PATH.
set -uo pipefail
# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
cd "$REPOSITORY" || exit 1
PATH="$VENV/bin:$PATH"
failed=0

check() {
    local name="$1" started="$SECONDS" output
    shift
    if ! command -v "${name%% *}" >/dev/null; then
        echo "$name: FAILED: it is not installed: pip install -c constraints.txt '.[dev]'"
        failed=1
    elif output="$("$@" 2>&1)"; then
        echo "$name: ok ($((SECONDS - started)) s)"
    else
        echo "$name: FAILED ($((SECONDS - started)) s)"
        echo "$output"
        failed=1
    fi
}

check_shell_scripts() {
    {
        find . \( -name '.?*' -o -name build -o -name runs \) -prune -o -name '*.sh' -print0
        [[ ! -f .ci/run ]] || printf '%s\0' .ci/run
    } | xargs -0 shellcheck --external-sources --severity=warning
}

check "ruff check" ruff check
check "ruff format" ruff format --check
check "mypy" mypy # its files are in setup.cfg
check "shellcheck" check_shell_scripts
exit "$failed"
