#!/bin/bash
# Convert a collection by Slurm array jobs:
#
#     SHARDS=100 tools/slurm/convert_array.sh SOURCE TARGET [further options of `fmristream convert`]
#
# submits three jobs and prints their numbers: an array that finds brain masks, an array that converts runs, and one job
# that commits the dataset. SOURCE and TARGET are paths that every node sees, or s3:// URLs. Tasks may be killed, requeued
# or run twice; run the same command again after a failure, and finished work is found. Nothing is visible in TARGET
# before the last job.
#
# Variables, all optional:
#     SHARDS      tasks of each array (default 16; at most the site's MaxArraySize - 1)
#     AT_ONCE     how many of them run at the same time (default: all)
#     VISITS      2, or 1 where no mask is computed (--mask none, --mask FILE): then the first array is not needed
#     PARTITION   partition            ACCOUNT     account
#     TIME        time limit of a task, as sbatch takes it (default 04:00:00)
#     MEMORY      memory of a task (default 2G)
#     CPUS        cores of a task (default 1)
#     SETUP       file to source in each task first, such as ~/fmristream.env with `module load` and `activate`
#     LOGS        folder for what tasks print (default: the current one)
set -euo pipefail

task() { # one array task, or the commit
    # shellcheck disable=SC1090
    [ -z "${SETUP:-}" ] || source "$SETUP"
    if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
        exec fmristream convert "$@" --quiet
    fi
    # Two minutes before the time limit Slurm tells this shell, which asks for another turn; finished runs are kept.
    trap 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"' USR1
    fmristream convert "$@" --quiet --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" &
    local status=0
    wait $! || status=$?
    while [ "$status" -gt 128 ] && kill -0 $! 2>/dev/null; do # the wait was interrupted, not the work
        status=0
        wait $! || status=$?
    done
    # 3: done, with damaged inputs left out. The commit finds them again and says why.
    [ "$status" -ne 3 ] || status=0
    exit "$status"
}

submit() { # prints the number of the job
    sbatch --parsable --job-name="$1" --requeue --open-mode=append --kill-on-invalid-dep=yes --export=ALL \
        --time="${TIME:-04:00:00}" --mem="${MEMORY:-2G}" --cpus-per-task="${CPUS:-1}" \
        ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} "${@:2}"
}

if [ "${1:-}" = --task ]; then
    task "${@:2}"
fi
if [ $# -lt 2 ]; then
    sed -n '2,20p' "$0" >&2
    exit 2
fi
[ -z "${LOGS:-}" ] || mkdir -p "$LOGS"
array="--array=1-${SHARDS:-16}${AT_ONCE:+%$AT_ONCE}"
output="--output=${LOGS:-.}/%x-%A_%a.out"
after=()
for visit in masks runs; do
    if [ "$visit" = masks ] && [ "${VISITS:-2}" = 1 ]; then continue; fi
    job=$(submit "fmristream-$visit" "$array" "$output" --signal=B:USR1@120 "${after[@]}" "$0" --task "$@")
    echo "$visit: job $job"
    after=("--dependency=afterok:${job%%;*}")
done
job=$(submit fmristream-commit "--output=${LOGS:-.}/%x-%j.out" "${after[@]}" "$0" --task "$@")
echo "commit: job $job"
