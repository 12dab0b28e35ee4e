#!/usr/bin/env bash
# Evaluate models x task sets: a job array, one element for each pair, and a last job that compares the models.
#
#   slurm/sweep.sh LIST OUTPUT [--at-once=N] [options of sbatch, each in one word: --nodes=1 --gpus-per-node=8 --time=4:00:00]
#
# LIST is a text file. A flag with blanks or quotes in it, such as JSON, is in single quotes:
#
#   model  small  --model_args pretrained=/models/small,dtype=bfloat16
#   model  large  --model_args pretrained=/models/large,dtype=bfloat16
#   models train  --models '/models/train/checkpoint-*' --model_args dtype=bfloat16
#   tasks  mmlu   --tasks mmlu --num_fewshot 5
#   tasks  quick  --tasks hellaswag,piqa
#
# A line "models" is one launch for many small models, `ddp_eval sweep`. The run of each pair is in OUTPUT/MODEL/TASKS, the
# comparison of the models in OUTPUT/compare.TASKS.txt, that of each line "models" in OUTPUT/compare.TASKS.NAME.txt. The same
# command again resumes what is unfinished. The lines marked EDIT are those of eval.sh, which lies beside this file.
#SBATCH --job-name=ddp_eval_sweep
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

die() {
    echo "sweep.sh: $*" >&2
    exit 2
}

# Fill models, tasks (names), several[NAME] of lines "models", and flags[model NAME] or flags[tasks NAME] from the list file.
declare -a models=() tasks=()
declare -A flags=() several=()
read_list() {
    local kind name rest key
    ! grep -q $'\r' "$1" || die "$1 has Windows line ends: take them out, as by sed -i 's/\\r$//' $1"
    while read -r kind name rest || [[ -n "$kind" ]]; do
        [[ -z "$kind" || "$kind" == \#* ]] && continue
        [[ "$name" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
            die "$1: the name after $kind must be letters, digits, . _ -, and begin with neither . nor -, got \"$name\""
        key="${kind/#models/model}"
        [[ "$key $name" != "model logs" ]] || die "$1: a model cannot be named logs, which is where the sweep's own words go"
        [[ -z "${flags[$key $name]+there}" ]] || die "$1: there are two lines $key $name"
        case "$kind" in
            model) models+=("$name") ;;
            models)
                models+=("$name")
                several[$name]=1
                ;;
            tasks) tasks+=("$name") ;;
            *) die "$1: a line must begin with model, models or tasks, got \"$kind\"" ;;
        esac
        flags[$key $name]="$rest"
    done <"$1"
    ((${#models[@]} && ${#tasks[@]})) || die "$1 must have a line \"model NAME FLAGS\" and a line \"tasks NAME FLAGS\""
}

# The flags of a model on a task set, split by a shell's quotes, without expanding anything: one word on each line. Of a line
# "models" the command comes first.
split_words() {
    [[ -z "${several[$1]+there}" ]] || echo sweep
    xargs -r -n 1 printf '%s\n' <<<"${flags[model $1]} ${flags[tasks $2]}" 2>/dev/null ||
        die "the flags of model $1 and tasks $2 cannot be split into words: is a quote not closed?"
}

# On the login node.
submit() {
    local list="$1" output="$2" at_once="" option eval_script copy array report model task
    local -a options=() shared=()
    shift 2
    for option in "$@"; do
        case "$option" in
            --at-once=*) at_once="%${option#*=}" ;;
            --partition=* | --account=* | --qos=* | --reservation=* | --time=* | --constraint=*)
                options+=("$option")
                shared+=("$option")
                ;;
            -*) options+=("$option") ;;
            *) die "an option of sbatch must be one word, --name=value, got $option" ;;
        esac
    done
    [[ -r "$list" ]] || die "cannot read the list $list"
    read_list "$list"
    for model in "${models[@]}"; do
        for task in "${tasks[@]}"; do
            split_words "$model" "$task" >/dev/null || exit
        done
    done
    eval_script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/eval.sh"
    [[ -r "$eval_script" ]] || die "eval.sh is not beside sweep.sh: run slurm/sweep.sh itself, not through sbatch"
    mkdir -p "$output/logs"
    output="$(cd "$output" && pwd)"
    # What is edited later must not change the elements of an array that waits.
    copy="$output/logs/list-$(cksum <"$list" | cut -d ' ' -f 1)"
    cp "$list" "$copy"
    array="$(sbatch --parsable --output="$output/logs/%A_%a.out" "${options[@]}" \
        --array="0-$((${#models[@]} * ${#tasks[@]} - 1))$at_once" "${BASH_SOURCE[0]}" --element "$copy" "$output" "$eval_script")"
    array="${array%%;*}"
    echo "array $array: ${#models[@]} models x ${#tasks[@]} task sets, in $output"
    report="$(sbatch --parsable --output="$output/logs/%j.report.out" "${shared[@]}" --nodes=1 --ntasks=1 \
        --dependency="afterany:$array" "${BASH_SOURCE[0]}" --report "$copy" "$output" "$eval_script")"
    echo "report ${report%%;*} follows"
}

# In the array: one model on one task set.
run_element() {
    local model task text
    local -a words=()
    read_list "$1"
    model="${models[SLURM_ARRAY_TASK_ID / ${#tasks[@]}]}"
    task="${tasks[SLURM_ARRAY_TASK_ID % ${#tasks[@]}]}"
    text="$(split_words "$model" "$task")" || exit
    [[ -z "$text" ]] || mapfile -t words <<<"$text"
    exec bash "$3" "${words[@]}" --output_path "$2/$model/$task"
}

# Arguments: the file, and runs or the directory of a sweep. Also prints it.
compare_into() {
    local aside="${1%/*}/.${1##*/}"
    if ! "${PYTHON[@]}" "${PROGRAM[@]}" compare "${@:2}" >"$aside"; then
        rm "$aside"
        return 1
    fi
    mv "$aside" "$1"
    cat "$1"
}

# In the last job: what is done, and the models side by side on each task set.
write_report() {
    local output="$2" task model text code=0
    local -a runs sweeps
    read_list "$1"
    # shellcheck disable=SC1090
    source <(sed '/^# EDIT ends here/q' "$3")
    setup
    # Of an earlier report. Not by a pattern: the name of another task set may go on behind a dot.
    for task in "${tasks[@]}"; do
        rm -f "$output/compare.$task.txt"
        for model in "${models[@]}"; do
            rm -f "$output/compare.$task.$model.txt"
        done
    done
    for task in "${tasks[@]}"; do
        runs=()
        sweeps=()
        for model in "${models[@]}"; do
            text="$(split_words "$model" "$task")" || exit
            if ! { [[ -f "$output/$model/$task/status.json" ]] && grep -qs '"state": *"done"' "$output/$model/$task/status.json"; }; then
                echo "$model $task: not done, see $output/logs; slurm/sweep.sh with the same list resumes it"
                code=1
            elif [[ "$(cat "$output/$model/$task/logs/flags" 2>/dev/null)" == "${text:+$text$'\n'}--output_path"* ]]; then
                echo "$model $task: done"
                if [[ -n "${several[$model]+there}" ]]; then
                    sweeps+=("$model")
                else
                    runs+=("$output/$model/$task")
                fi
            else
                echo "$model $task: the run there is of other flags; what the list asks for has not run: see the element's log" \
                    "in $output/logs; if it was refused, --overwrite in the list replaces that run"
                code=1
            fi
        done
        if ((${#runs[@]} > 1)); then
            compare_into "$output/compare.$task.txt" "${runs[@]}" || code=1
        fi
        for model in "${sweeps[@]}"; do
            compare_into "$output/compare.$task.$model.txt" "$output/$model/$task" || code=1
        done
    done
    return "$code"
}

case "${1:-}" in
    --element) run_element "${@:2}" ;;
    --report) write_report "${@:2}" ;;
    *)
        (($# >= 2)) || die "give a list file and an output directory: slurm/sweep.sh LIST OUTPUT [options of sbatch]"
        submit "$@"
        ;;
esac
