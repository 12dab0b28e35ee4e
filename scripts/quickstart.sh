#!/usr/bin/env bash
# Sets up .venv, then evaluates the embedded model on the embedded tasks with NPROC ranks (2). Needs no GPU.
# Further flags go to ddp_eval: scripts/quickstart.sh --limit 10
set -euo pipefail
# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv

output=(--output_path "$REPOSITORY/runs/quickstart" --overwrite)
for flag in "$@"; do
    # A directory of the user's own is never overwritten unasked.
    case "$flag" in --output[-_]path* | -o) output=() ;; esac
done

OMP_NUM_THREADS=1 "$VENV/bin/torchrun" --standalone --nproc_per_node="${NPROC:-2}" -m ddp_eval ${output[@]+"${output[@]}"} "$@"
