# Sourced by quickstart.sh and test.sh: the virtual environment that this repository's commands run in.
#
#   setup_venv [EXTRAS]    makes $VENV, or brings it up to date, with the package and its EXTRAS ("test,dev")
#
# $VENV is .venv at the top of the repository, or DDP_EVAL_VENV. PYTHON names an interpreter to prefer.
# shellcheck shell=bash

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DDP_EVAL_VENV:-$REPOSITORY/.venv}"

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer is needed and none was found: install one, or name it as PYTHON=/path/to/python3" >&2
    return 1
}

setup_venv() {
    local extras="${1:-}" python key stamp
    stamp="$VENV/.ddp_eval-${extras:-base}"
    key="$REPOSITORY $(cat "$REPOSITORY"/{setup.cfg,pyproject.toml,constraints.txt} | cksum)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
        return
    fi
    python="$(find_python)" || return
    echo "Setting up $VENV (some minutes the first time)" >&2
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$VENV" >&2 || return
    # compat: a plain path entry. From the directory above a clone, setuptools' import hook would lose to the clone itself.
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --config-settings editable_mode=compat \
        -c "$REPOSITORY/constraints.txt" -e "$REPOSITORY${extras:+[$extras]}" >&2 || return
    printf '%s\n' "$key" >"$stamp"
}
