#!/usr/bin/env bash
# Waits until the TPU is there. Gives it back, and fails, when the request fails or WAIT_SECONDS have passed.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

trap give_back_on_failure EXIT
last=''
while true; do
    now=$(state)
    [[ $now == "$last" ]] || ((DRY_RUN)) || say "$NAME: $now"
    last=$now
    case $now in
        ACTIVE) exit 0 ;;
        NONE) die "$NAME: there is no such request; create.sh makes one" ;;
        FAILED) die "$NAME: the request failed: $(reason)" ;;
        SUSPENDING | SUSPENDED) die "$NAME: was taken away ($now); it never comes back: delete it and create anew" ;;
        CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | DELETING) ;;
        *) die "$NAME: unknown state '$now'" ;;
    esac
    ((SECONDS < WAIT_SECONDS)) || die "$NAME: no capacity for $ACCELERATOR_TYPE in $ZONE within $WAIT_SECONDS s ($now)"
    sleep "$POLL_SECONDS"
done
