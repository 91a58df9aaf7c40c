#!/usr/bin/env bash
# Copies the results from the bucket to RESULTS: delta and card, the PEFT folder, metrics, summary and plot.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

run mkdir -p "$RESULTS"
run gcloud storage rsync --recursive "--exclude=^(.*/)?(checkpoints|[.]many)/" "$OUTPUT" "$RESULTS"
