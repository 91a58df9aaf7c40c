#!/usr/bin/env bash
# Makes the bucket in the TPU's region, and lets compiled programs expire after 30 days. Safe to run again.
# Another region would cost egress for every read, and time at every start: refused.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

describe=(gcloud storage buckets describe "$BUCKET" "--format=value(location)")
create=(gcloud storage buckets create "$BUCKET" --project="$PROJECT" --location="$REGION" --uniform-bucket-level-access)
if ((DRY_RUN)); then
    quoted "${describe[@]}"
    quoted "${create[@]}"
elif answer=$("${describe[@]}" 2>&1); then
    found=${answer##*$'\n'}
    [[ ${found,,} == "$REGION" ]] ||
        die "$BUCKET is in ${found,,}, the TPU in $REGION; name a bucket in the same region"
elif [[ $answer == *"not found"* || $answer == *404* ]]; then
    run "${create[@]}"
else
    die "$BUCKET: ${answer##*$'\n'}"
fi
run gcloud storage buckets update "$BUCKET" --lifecycle-file="$HERE/lifecycle.json"
