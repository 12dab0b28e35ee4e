#!/usr/bin/env bash
# What one GPU can tell, in under 12 minutes, most worth first; see bench_gpu.py. The record so far is there whenever it ends.
#
#   scripts/bench_gpu.sh --out benchmarks/gpu_NAME        on the card
#   scripts/bench_gpu.sh --rehearse                       the same parts on the CPU with tiny shapes
#
# PYTHON names the interpreter, with this package's dependencies and those of its tests; python3 if it is not set.
# benchmarks/README.md says what else a machine must have, and how to run it in two commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/bench_gpu.py "$@"
