#!/usr/bin/env bash
# Prints the end of the log of a host, and follows it: logs.sh [NODE [WORKER]], by default those of process 0.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
((${#REST[@]} <= 2)) || die "${REST[2]}: unknown; see logs.sh --help"

resource ssh "$NAME" --node="${REST[0]:-0}" --worker="${REST[1]:-0}" --command="tail -n 100 -F ~/jaxbake-job/log"
