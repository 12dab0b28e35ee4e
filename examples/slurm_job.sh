#!/usr/bin/env bash
# A SLURM job with its own header: edit, then `sbatch examples/slurm_job.sh` at the top of the repository. What the job does when it
# is pre-empted, requeued, out of time or loses a node is in docs/guide/slurm.md.
#SBATCH --job-name=llama-mmlu
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

flags=(
    --model_args "pretrained=meta-llama/Llama-3.1-8B,dtype=bfloat16"
    --tasks "mmlu,hellaswag"
    --num_fewshot 5
    --output_path runs/llama-mmlu # on a file system that all nodes share
)

# exec: the job's signals must reach eval.sh itself. Modules, Python and the network interface are set between its EDIT lines.
exec bash slurm/eval.sh "${flags[@]}"
