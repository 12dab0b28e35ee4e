#!/usr/bin/env bash
# Evaluate a model on one node or many under SLURM. Everything behind the script's name goes to ddp_eval:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 slurm/eval.sh \
#       --model_args pretrained=meta-llama/Llama-3.1-8B,dtype=bfloat16 --tasks mmlu --output_path runs/llama
#
# or many models in one launch, or the checkpoints of a training as they come:
#
#   sbatch --nodes=1 --gpus-per-node=8 --time=8:00:00 slurm/eval.sh sweep \
#       --models 'train/checkpoint-*' --watch --until train/finished --tasks mmlu --output_path runs/sweep
#
# A job that is pre-empted or meets its time limit leaves a clean journal, goes back into the queue and resumes; one that is done
# never does. docs/guide/slurm.md describes all of it.
#SBATCH --job-name=ddp_eval
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

# EDIT what differs from site to site.
setup() { # runs on every node before Python: modules, a virtual environment, NCCL's settings
    :     # module load cuda; source "$HOME/venv/bin/activate"
}
SRUN=(srun)       # containers through pyxis: (srun --container-image=image.sqsh --container-mounts="$PWD" --container-workdir="$PWD")
PYTHON=(python)   # containers without: (apptainer exec --nv image.sif python)
PROGRAM=(-m ddp_eval)
INTERFACE=""      # the network interface between the nodes, such as ib0; empty: the one that NCCL and gloo find
RANKS_PER_NODE="" # empty: one for each GPU of the job; without GPUs --ntasks-per-node of them, or one for each CPU
RESTARTS=2        # starts again in the same job after a rank or a launcher has died
REQUEUES=100      # goes back into the queue at most so often
# EDIT ends here.

set -uo pipefail

TIME_LIMIT="the time limit is near"

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "slurm/eval.sh runs in a SLURM job: sbatch slurm/eval.sh FLAGS. Without SLURM: torchrun -m ddp_eval FLAGS" >&2
    exit 2
fi

# The last element of an array has the whole array's id as its SLURM_JOB_ID: scancel and scontrol would take it for all of them.
JOB="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
JOB="${JOB:-$SLURM_JOB_ID}"

say() {
    echo "$(date '+%F %T') ddp_eval: job $JOB: $*"
}

# The value of --output_path among the flags, in any spelling; the last one counts.
find_output() {
    local found=""
    while (($#)); do
        case "$1" in
            --output[-_]path=*) found="${1#*=}" ;;
            --output[-_]path | -o) found="${2:-}" ;;
        esac
        shift
    done
    printf '%s' "$found"
}

# Whether this job, at whatever start, has finished the run, or has found it complete. A run that it was to replace does not count.
is_done() {
    { [[ -f "$output/status.json" ]] && grep -s '"state": *"done"' "$output/status.json" | grep -q "\"slurm\": *\"$JOB\""; } ||
        { [[ -z "$sweeping" ]] && grep -qs 'holds this very run, complete: nothing is left to do' "${LOGS:-/dev/null}".*.log; }
}

# What --expect of `reproduce` asks for, such as "within 0.01". No other command has it.
find_expectation() {
    local found=""
    [[ "${1:-}" == reproduce ]] || return 0
    while (($#)); do
        case "$1" in
            --expect=*) found="${1#*=}" ;;
            --expect)
                found="${*:2:1}"
                [[ "$found" != within ]] || found="${*:2:2}"
                ;;
        esac
        shift
    done
    printf '%s' "$found"
}

# Whether a rank has compared, and found the run not as --expect asks for: exit code 3.
is_not_as_expected() {
    grep -qs '^ *exitcode *: 3 ' "$output/logs/$JOB".*.log
}

# For a run that is done, but whose comparison has not ended well, at this start or an earlier one.
fail_expectation() {
    if is_not_as_expected; then
        fail "failed, not requeued" "$output is done, and not as expected (--expect $expectation): \`ddp_eval compare\` shows both runs"
    fi
    fail "failed, not requeued" "$output is done, but its comparison (--expect $expectation) came to no end: \
\`ddp_eval compare --expect $expectation\` makes it"
}

# How this start of a sweep came to the end of its models, such as "3 done, 1 failed"; nothing where it did not come so far.
# sweep.json says how models stand in all launches, and not which of them has come to its end.
end_of_sweep() {
    [[ -z "$sweeping" ]] || grep -hs '^ddp_eval: the sweep is over: ' "$LOGS".*.log | tail -n 1 | sed 's/^ddp_eval: the sweep is over: //'
}

# On success. Arguments: the flags, which sweep.sh compares with its list.
leave_done() {
    printf '%s\n' "$@" >"$output/logs/flags"
    [[ -z "$expectation" ]] || touch "$output/logs/$JOB.as_expected"
    is_done || write_status "done" ""
    say "done: $output"
    exit 0
}

# Whether a rank left over something that the user must mend (exit code 2, which torchrun reports and itself returns as 1).
is_for_the_user() {
    grep -qs '^ *exitcode *: 2 ' "$LOGS".*.log
}

# What a rank last said, its progress left out.
last_words() {
    local words
    words="$(grep -hs '^ddp_eval: ' "$LOGS".*.log | grep -v ' s so far' | tail -n 1 | sed 's/^ddp_eval: //')"
    printf '%s' "${words:-no rank said why}"
}

is_own_lock() {
    grep -qs "\"slurm_job\": *\"$JOB\"" "$1"
}

# Whether a run of another job is at work in the directory: it touches its lock every few seconds.
is_taken() {
    local lock
    for lock in "$output"/.ddp_eval.lock ${sweeping:+"$output"/*/.ddp_eval.lock}; do
        [[ -z "$(find "$lock" -mmin -1 2>/dev/null)" ]] || is_own_lock "$lock" || return 0
    done
    return 1
}

# A job that fails before it has opened the run directory (a wrong flag, a bad node, no Python) tells scripts too. Arguments: the
# state, and why. The fields are those of ddp_eval/output/status.py. Nothing replaces "done", or what another run at work has said.
note_end() {
    if is_taken || { [[ -f "$output/status.json" ]] && grep -qs '"state": *"done"' "$output/status.json"; }; then
        return
    fi
    write_status "$1" "$2"
}

# Arguments: the state, and why.
write_status() {
    local reason="${2//[[:cntrl:]]/ }" aside="$output/.status.json.$JOB.ddp_eval.tmp"
    reason="${reason//\\/\\\\}"
    reason="${reason//\"/\\\"}"
    printf '{"state": "%s", "reason": "%s", "time": "%s", "launch": {"slurm": "%s"}}\n' \
        "$1" "$reason" "$(date -Iseconds)" "$JOB" >"$aside" && mv "$aside" "$output/status.json"
}

# Arguments: how it failed, and why.
fail() {
    note_end failed "$2"
    say "$1: $2"
    exit 1
}

# A controller that is busy or being restarted does not answer for a while: ask again, for half a minute and its own time-outs.
ask_controller() {
    local try
    for try in 1 2 3 4 5 6; do
        ((try == 1)) || sleep 5
        "$@" && return
    done
    return 1
}

# What SLURM thinks of this start of the job: RUNNING, or how it has ended it. On a node that SLURM lost, another start may run.
# A controller that says nothing has ended nothing.
job_state() {
    local facts state
    facts="$(ask_controller scontrol show job -o "$JOB" 2>/dev/null)"
    if [[ "$facts" == *" JobState=RUNNING "* && "$facts" != *" Restarts=$restart "* ]]; then
        echo "RUNNING elsewhere"
    else
        state="$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$facts")"
        echo "${state:-RUNNING}"
    fi
}

address_of() {
    local address
    address="$(sed -n "s/^$1=//p" <<<"$ADDRESSES")"
    echo "${address:-$1}"
}

# On every node: one torchrun. Arguments: the program's. Variables: ADDRESSES, HEAD, RENDEZVOUS, LOGS, and those above.
run_node() {
    # srun, site prologues and shells leave some of these behind; a rank would take them for its own.
    unset RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE
    unset MASTER_ADDR MASTER_PORT "${!TORCHELASTIC_@}" "${!PET_@}"
    mkdir -p "${LOGS%/*}" # a node may have a disk of its own there
    exec 2>>"$LOGS.$SLURMD_NODENAME.log"
    setup || exit
    if [[ -n "$INTERFACE" ]]; then
        export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
    fi
    # On CPUs the number of threads decides the last bits.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    local ranks="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${TASKS_PER_NODE:-$SLURM_CPUS_ON_NODE}}}"
    # torchrun would die of USR1 and leave its workers behind.
    trap '' USR1
    exec "${PYTHON[@]}" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="$RENDEZVOUS" --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
        --local-addr="$(address_of "$SLURMD_NODENAME")" "${PROGRAM[@]}" "$@"
}

# One srun over all nodes; its exit code. Signals that come meanwhile are dealt with by the traps.
run_step() {
    local code=0
    # A port below those that the kernel gives out by itself; another for each start, in case something sits on it.
    export HEAD="$HEAD_ADDRESS:$((10000 + (SLURM_JOB_ID + 7919 * (restart + attempt)) % 20000))"
    export RENDEZVOUS="$JOB.$restart.$attempt" LOGS="$output/logs/$JOB.$restart.$attempt"
    # What --fresh and --overwrite ask for is done once, at the first start that comes so far.
    export SLURM_RESTART_COUNT="$((restart + attempt))"
    say "start on $SLURM_JOB_NODELIST; the output of each node is in $LOGS.NODE.log"
    # --wait: when one node's torchrun has ended, the others, which notice by themselves, are ended after so many seconds.
    "${SRUN[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --wait=60 \
        bash -c "$(declare -f setup address_of run_node); $(declare -p PYTHON PROGRAM); run_node \"\$@\"" eval.sh "$@" &
    step=$!
    [[ "$stopping" != "$TIME_LIMIT" ]] || tell_ranks # the warning came just before
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    step=""
    return "$code"
}

# SIGTERM to the tasks, not to srun, which would have them killed. A step that has not begun yet would not hear it.
tell_ranks() {
    local second
    [[ -z "$told" ]] || return # a second SIGTERM would disturb what the first one began
    told=1
    for ((second = 0; second < 60; second++)); do
        ! compgen -G "$LOGS.*.log" >/dev/null || break
        kill -0 "$step" 2>/dev/null || return
        sleep 1
    done
    ask_controller scancel --signal=TERM "$JOB"
}

on_time_limit() {
    stopping="$TIME_LIMIT"
    say "$stopping: telling the ranks to stop"
    [[ -z "$step" ]] || tell_ranks
}

on_stop() {
    # SLURM has told the tasks itself, and may kill this script before they have ended.
    stopping="SLURM ends it"
    say "$stopping; finished packs are kept: it resumes when SLURM starts it again, or by the same command"
}

# Pre-emption with a grace time tells the tasks alone.
is_preempted() {
    ask_controller scontrol show job -o "$JOB" 2>/dev/null | grep -q ' PreemptTime=[0-9]'
}

journal_sizes() {
    wc -c "$output"/journal/*.journal "$output"/*/journal/*.journal "$output"/*/manifest.json 2>/dev/null
}

# Whether both this start and the one before were warned of the time limit before they had finished a pack.
is_in_vain() {
    local before
    [[ " $flags " != *" --watch "* ]] || return # it may wait for a checkpoint that long
    [[ "$stopping" == "$TIME_LIMIT" && "$(journal_sizes)" == "$journals" ]] || return
    before="$(cat "$output/logs/$JOB.in_vain" 2>/dev/null)"
    echo "$restart" >"$output/logs/$JOB.in_vain"
    ((restart > 0)) && [[ "$before" == "$((restart - 1))" ]]
}

requeue_and_leave() {
    local state
    state="$(job_state)"
    if [[ "$state" != RUNNING ]]; then
        say "$1; SLURM's state for it is $state"
        exit 75
    fi
    if is_in_vain; then
        fail "failed, not requeued" "the warning before the time limit came before a pack was finished, twice in a row: \
let --time be well over the warning (--signal, 120 s if not changed) plus the start"
    fi
    if ((restart >= REQUEUES)); then
        say "$1; not requeued, after $restart times already: the same command resumes"
        exit 75
    fi
    if ask_controller scontrol requeue "$JOB"; then
        say "$1; requeued, to resume where it stopped"
        exit 0
    fi
    say "$1; SLURM refused to requeue it: the same command resumes"
    exit 75
}

output="$(find_output "$@")"
if [[ -z "$output" ]]; then
    say "--output_path DIR is missing: a job needs a run directory, on a file system that all nodes share"
    exit 2
fi
if ! reason="$({ mkdir -p "$output/logs" && touch "$output/logs"; } 2>&1)"; then
    say "failed, not requeued: --output_path $output cannot be written to (${reason##*: })"
    exit 2
fi

flags="$*"
sweeping="" # whether the flags are of a sweep, whose directory holds a run for each model
[[ "${1:-}" != sweep ]] || sweeping=1
expectation="$(find_expectation "$@")"
restart="${SLURM_RESTART_COUNT:-0}"
journals="$(journal_sizes)"
stopping=""
step=""
told=""
LOGS=""
if ((restart > 0)); then
    if is_done; then
        [[ -z "$expectation" || -e "$output/logs/$JOB.as_expected" ]] || fail_expectation
        say "was done before it was requeued: nothing to do"
        leave_done "$@"
    fi
    say "restart $restart: resumes"
    # SLURM says that the earlier start is over. Where it still runs, on a node that SLURM has lost, it ends when its lock is gone.
    # A lock of any other job is none of ours. A sweep has one for each model.
    for lock in "$output"/.ddp_eval.lock ${sweeping:+"$output"/*/.ddp_eval.lock}; do
        ! is_own_lock "$lock" || rm -f "$lock"
    done
fi

# Addresses as SLURM knows them, "n1=10.0.0.1" on each line: host names need not resolve.
ADDRESSES="$(scontrol show node -o "$SLURM_JOB_NODELIST" | sed -n 's/.*NodeName=\([^ ]*\) .* NodeAddr=\([^ ]*\).*/\1=\2/p')"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
HEAD_ADDRESS="$(address_of "$first")"
export ADDRESSES
export TASKS_PER_NODE="${SLURM_NTASKS_PER_NODE:-}" INTERFACE RANKS_PER_NODE
# Set by sbatch for tasks of other shapes than ours; the last, after sbatch --export, would strip PATH.
unset SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_EXPORT_ENV

trap on_time_limit USR1
trap on_stop TERM

for ((attempt = 0; ; attempt++)); do
    # A signal that came when no rank ran.
    [[ -z "$stopping" ]] || requeue_and_leave "stopped: $stopping"
    run_step "$@"
    code=$?
    # srun also returns 0 when it has lost the only node, and another code when a signal came behind the last word.
    if is_done; then
        [[ -z "$expectation" ]] || ((code == 0)) || fail_expectation
        leave_done "$@"
    elif [[ -n "$stopping" ]]; then
        requeue_and_leave "stopped: $stopping"
    elif is_preempted; then
        requeue_and_leave "stopped: a job of higher priority needs the nodes"
    elif [[ "$(job_state)" != RUNNING ]]; then
        say "ended with code $code; SLURM's state for it is $(job_state)"
        exit 75
    elif [[ "$code" == 0 && -n "$sweeping" && -f "$output/sweep.json" ]]; then
        leave_done "$@"
    elif [[ "$(end_of_sweep)" == *" failed"* ]]; then
        fail "failed, not requeued" "some models of the sweep failed: see $output/sweep.json"
    elif [[ "$(end_of_sweep)" == *" at work in another launch"* ]]; then
        note_end preempted "models of the sweep were left to another launch: see $output/sweep.json"
        say "ended, and left models of the sweep to another launch, which is at work on them: see $output/sweep.json"
        exit 75
    elif ((code == 0)) && [[ " $* " == *" --preflight"* ]]; then
        say "node checks passed; nothing was evaluated"
        exit 0
    elif is_for_the_user; then
        fail "failed, not requeued" "$(last_words)"
    elif ((code == 0 && attempt >= RESTARTS)); then
        fail "failed, not requeued" "the ranks ended well, but $output/status.json on this node does not say so: do all share it?"
    elif ((attempt >= RESTARTS)); then
        fail "failed with code $code, after $attempt restarts" "$(last_words); see $LOGS.*.log"
    fi
    say "a rank or a launcher has died (code $code): starts again, restart $((attempt + 1)) of $RESTARTS"
done
