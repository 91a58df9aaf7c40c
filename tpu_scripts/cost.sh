#!/usr/bin/env bash
# Prints what an hour costs: chips x PRICE_PER_CHIP_HOUR, which you look up; with hours given, what those cost.
#   PRICE_PER_CHIP_HOUR=... ./cost.sh [HOURS]
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"

[[ -n $PRICE_PER_CHIP_HOUR ]] ||
    die "PRICE_PER_CHIP_HOUR is not set; look it up for $ACCELERATOR_TYPE in $REGION: https://cloud.google.com/tpu/pricing"
count=${ACCELERATOR_TYPE##*-}
[[ $ACCELERATOR_TYPE == v5p-* ]] && count=$((count / 2)) # v5p counts cores, two a chip
awk -v chips=$((count * SLICES)) -v price="$PRICE_PER_CHIP_HOUR" -v hours="${REST[0]:-1}" 'BEGIN {
    printf "%d chips x %s a chip and hour x %s h = %.2f (TPU alone; the bucket is billed for itself)\n",
        chips, price, hours, chips * price * hours
}'
