#!/usr/bin/env bash
# Runs on a TPU host: keeps one command running after the connection that started it is gone, and knows how it ended.
#   host.sh start COMMAND...   starts it, unless it is running
#   host.sh status             prints "worker HOST running", "worker HOST exit CODE", or "worker HOST idle"
#   host.sh stop               SIGTERM to it: the bake saves and leaves
#   host.sh log [LINES]        the end of what it said
set -euo pipefail

folder=${JAXBAKE_JOB:-$HOME/jaxbake-job}
mkdir -p "$folder"

running() {
    [[ -f $folder/pid && ! -f $folder/exit ]] || return 1
    local status
    status=$(ps -o stat= -p "$(<"$folder/pid")") && [[ $status != Z* ]]
}

case ${1:-} in
    start)
        shift
        if running; then
            echo "worker $(hostname) running"
            exit 0
        fi
        rm -f "$folder/exit" "$folder/pid"
        # shellcheck disable=SC2016  # expanded by the inner shell
        setsid nohup bash -c '
            trap : TERM # the command gets it too, and its exit code is what counts
            folder=$1
            shift
            "$@"
            echo $? >"$folder/exit.new"
            mv "$folder/exit.new" "$folder/exit"
        ' job "$folder" "$@" >>"$folder/log" 2>&1 </dev/null &
        pid=$!
        # It leads a group of its own once setsid has run; before, stop would not find it.
        while group=$(ps -o pgid= -p "$pid") && [[ ${group// /} != "$pid" ]]; do sleep 0.02; done
        echo "$pid" >"$folder/pid"
        echo "worker $(hostname) running"
        ;;
    status)
        if [[ -f $folder/exit ]]; then
            echo "worker $(hostname) exit $(<"$folder/exit")"
        elif running; then
            echo "worker $(hostname) running"
        elif [[ -f $folder/pid ]]; then
            echo "worker $(hostname) exit 137" # killed with its shell: a reboot, or no memory
        else
            echo "worker $(hostname) idle"
        fi
        ;;
    stop)
        if running; then kill -TERM -- "-$(<"$folder/pid")"; fi
        ;;
    log)
        tail -n "${2:-50}" "$folder/log"
        ;;
    *)
        echo "host.sh: start COMMAND..., status, stop, or log [LINES]" >&2
        exit 2
        ;;
esac
