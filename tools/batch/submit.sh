#!/bin/sh
# Convert a collection by AWS Batch array jobs:
#
#     QUEUE=my-queue SHARDS=200 tools/batch/submit.sh s3://bucket/bids s3://bucket/dataset [options of `fmristream convert`]
#
# submits two array jobs and one that commits, and prints their ids. First, once: build and push the image
# (tools/containers/Dockerfile), put its name, your account and a role that may read SOURCE and write TARGET into
# tools/batch/job_definition.json, and
#
#     aws batch register-job-definition --cli-input-json file://tools/batch/job_definition.json
#
# Variables: QUEUE (needed), SHARDS (2 to 10000, default 16), DEFINITION (default fmristream-convert), VISITS (1 where
# no mask is computed: --mask none or --mask FILE). Options must hold no blanks; the masks that they name must be in S3.
set -eu
if [ $# -lt 2 ] || [ -z "${QUEUE:-}" ]; then
    sed -n '2,13p' "$0" >&2
    exit 2
fi
source=$1 target=$2
shift 2
options=${*:---quiet} # Batch refuses an empty parameter
after=

submit() { # name, then further options; prints the job's id
    name=$1
    shift
    aws batch submit-job --job-name "$name" --job-queue "$QUEUE" --job-definition "${DEFINITION:-fmristream-convert}" \
        --parameters "{\"source\": \"$source\", \"target\": \"$target\", \"options\": \"$options\"}" \
        ${after:+--depends-on "jobId=$after"} "$@" --query jobId --output text
}

for visit in masks runs; do
    if [ "$visit" = masks ] && [ "${VISITS:-2}" = 1 ]; then continue; fi
    after=$(submit "fmristream-$visit" --array-properties "size=${SHARDS:-16}")
    echo "$visit: job $after"
done
echo "commit: job $(submit fmristream-commit)"
