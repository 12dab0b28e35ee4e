#!/usr/bin/env bash
# Repeat a finished run from its manifest, and fail if the bits have changed. For cron, every night at 3:
#
#   0 3 * * *  cd /path/to/checkout && examples/nightly_reproduce.sh runs/reference >>nightly.log 2>&1
#
# Arguments: the run to repeat, then further flags of `ddp_eval reproduce`. NPROC: ranks (1). Exit code 0: the same bits. Under
# torchrun every failure is 1; the last lines say which.
set -euo pipefail

run="${1:?usage: nightly_reproduce.sh RUN_DIR [flags]}"
shift
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # on CPUs the number of threads decides the last bits

launcher=(python)
if ((${NPROC:-1} > 1)); then
    launcher=(torchrun --standalone --nproc_per_node="$NPROC")
fi

echo "$(date '+%F %T') reproducing $run"
# --overwrite replaces last night's reproduction, once the new one has passed the checks of model, prompts and packages.
"${launcher[@]}" -m ddp_eval reproduce "$run" --overwrite --expect identical "$@"
