#!/bin/bash
# Train on one or many nodes by Slurm:
#
#     NODES=8 GPUS=4 tools/slurm/train.sh RECIPE OUT [further options of `python -m train`, such as --set data.url=URL]
#
# submits one job and prints its number. RECIPE is a .toml file or a name in train/recipes; OUT, and a dataset that is not in
# a bucket, are folders that every node sees. Before its time is up, when it is preempted and when a node fails, the job
# is queued again and goes on from the newest whole checkpoint in OUT; after the first two it has lost no step. A look at
# validation, and the last scoring, begin anew in each turn: they have to fit into TIME. Submitting the
# same again after anything else does the same. `scancel` ends it for good, after a checkpoint where that takes less than the
# site's KillWait.
#
# Variables, all optional:
#     NODES       nodes (default 1)
#     MIN_NODES   go on with as few when others fail, and with all when they are back (default: NODES, no fewer)
#     GPUS        GPUs, and so processes, of a node (default 0: CPU)
#     RANKS       processes of a node (default: GPUS, or 1)
#     CPUS        cores of a node (default 8)
#     MEMORY      memory of a node (default: the site's)
#     TIME        time limit of a turn, as sbatch takes it (default 04:00:00)
#     GRACE       seconds before the limit at which ranks write a checkpoint (default 120)
#     RESTARTS    how often the processes of a node start again within a turn (default 3)
#     PARTITION   partition            ACCOUNT     account
#     SETUP       file to source on the first node, such as ~/fmristream.env with `module load` and `activate`
#     LOGS        folder for what the job prints (default: the current one)
#     PORT        where the nodes meet on the first one (default: from the job's number)
#     EXTRA       further options of sbatch, such as "--qos=low --exclusive"
set -euo pipefail

is_stopped() { # whether the run in this folder was the last time asked to end, and did so after a checkpoint
    tail -n 1 "$1/log.jsonl" 2>/dev/null | grep -q '"event": "stop"'
}

stands_still() { # whether it was asked to end three times at the same step
    local steps
    steps=$(grep '"event": "stop"' "$1/log.jsonl" | tail -n 3 | grep -o '"step": [0-9]*')
    [ "$(wc -l <<<"$steps")" = 3 ] && [ "$(sort -u <<<"$steps" | wc -l)" = 1 ]
}

train() { # the job, on its first node
    local recipe=$1 out=$2 checkout=$3 warned='' cancelled='' again='' status=0
    # shellcheck disable=SC1090
    [ -z "${SETUP:-}" ] || source "$SETUP"
    export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take them over from sbatch
    export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # no stack traces of connections that end with the run
    local ranks=${RANKS:-${GPUS:-0}} fewest=${MIN_NODES:-$SLURM_JOB_NUM_NODES}
    [ "$ranks" != 0 ] || ranks=1
    local place
    place="$(hostname):${PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
    # One agent a node, which starts the ranks there, and starts them again with those of all others when one is lost.
    srun --kill-on-bad-exit=0 --wait=0 --no-kill --label \
        python -m train "$recipe" --out "$out" --nodes "$fewest:$SLURM_JOB_NUM_NODES" --rendezvous "$place" \
        --nproc "$ranks" --restarts "${RESTARTS:-3}" "${@:4}" &
    local step=$!
    # Slurm warns this shell alone, which passes it on; the agents hand it to the ranks, which write a checkpoint and end.
    trap 'warned=yes; kill -USR1 $step' USR1
    trap 'cancelled=yes' TERM # scancel, or Slurm queues the job again by itself
    wait "$step" || status=$?
    while [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null; do # the wait was interrupted, not the work
        status=0
        wait "$step" || status=$?
    done
    # Preemption with a grace time tells the ranks and not this shell; a job that ends in that time would count as done.
    if [ "$status" = 0 ] && is_stopped "$out"; then again=yes; fi
    if [ "$status" != 0 ] && [ -n "$warned" ]; then again=yes; fi # it took too long, and goes on from an older checkpoint
    if [ -n "$again" ] && [ -z "$cancelled" ] && is_stopped "$out" && stands_still "$out"; then
        echo "three turns ended at the same step: a look at validation, or the last scoring, needs more than TIME; submit it" \
            "again with more, or with a larger eval.stride"
    elif [ -n "$again" ] && [ -z "$cancelled" ]; then
        echo "the run goes on from its last checkpoint: job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}

if [ "${1:-}" = --job ]; then
    train "${@:2}"
fi
if [ $# -lt 2 ]; then
    sed -n '2,27p' "$0" >&2
    exit 2
fi
[ -z "${LOGS:-}" ] || mkdir -p "$LOGS"
mkdir -p "$2"
checkout=$(cd "$(dirname "$0")/../.." && pwd)
elastic=()
[ "${MIN_NODES:-${NODES:-1}}" = "${NODES:-1}" ] || elastic=(--no-kill)
# shellcheck disable=SC2086
job=$(sbatch --parsable --job-name=fmristream-train --requeue --open-mode=append --export=ALL \
    --nodes="${NODES:-1}" --ntasks-per-node=1 --cpus-per-task="${CPUS:-8}" --time="${TIME:-04:00:00}" \
    --signal="B:USR1@${GRACE:-120}" --output="${LOGS:-.}/%x-%j.out" "${elastic[@]}" \
    ${GPUS:+--gpus-per-node="$GPUS"} ${MEMORY:+--mem="$MEMORY"} \
    ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${EXTRA:-} \
    "$0" --job "$1" "$2" "$checkout" "${@:3}")
echo "train: job $job"
