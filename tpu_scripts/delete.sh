#!/usr/bin/env bash
# Gives the TPU back, and makes sure that it is gone. What is in the bucket stays.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

remove
((DRY_RUN)) || say "$NAME: gone"
