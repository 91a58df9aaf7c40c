#!/usr/bin/env bash
# Prints the state of the queued resource, and what each host says of the bake where there are hosts.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

now=$(state)
((DRY_RUN)) || say "$NAME: $now"
[[ $now != ACTIVE ]] || on_all "bash ~/jaxbake/tpu_scripts/host.sh status"
