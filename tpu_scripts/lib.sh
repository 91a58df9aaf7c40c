# What all scripts share. Sourced, never run. (Every return has its number: in a trap, a bare one would give the old one.)
# shellcheck shell=bash disable=SC2034  # its variables are for the scripts

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "bash $BASH_VERSION is too old; these scripts need 4.4 or newer" >&2
    exit 1
fi
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
DRY_RUN=0
KEEP=0
SETTINGS=$HERE/settings.env
REST=()
exec 3>&1 # standard output, also for what runs inside $(...)

# Reads the flags every script has; others stay in REST. A script's own comment at its top is its help.
start() {
    while (($#)); do
        case $1 in
            --dry-run) DRY_RUN=1 ;;
            --keep) KEEP=1 ;;
            --settings)
                [[ $# -ge 2 ]] || die "--settings: name a file"
                SETTINGS=$2
                shift
                ;;
            -h | --help)
                sed -n '2,/^set -euo/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"
                printf '\nFlags of every script: --dry-run (print the commands, run none), --settings FILE,\n'
                printf -- '--keep (leave what is rented when something fails).\n'
                exit 0
                ;;
            *) REST+=("$1") ;;
        esac
        shift
    done
    [[ -f $SETTINGS ]] || die "$SETTINGS: no such settings file; copy $HERE/settings.env"
    # shellcheck source=settings.env
    source "$SETTINGS"
    WHERE=(--project="$PROJECT" --zone="$ZONE")
    REGION=${ZONE%-*}
    [[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
        die "NAME=$NAME: must be lower-case letters, digits and dashes, a letter first, at most 40"
    [[ $BUCKET == gs://* ]] || die "BUCKET=$BUCKET: must begin with gs://"
    [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "SLICES=$SLICES: must be a whole number from 1"
}

no_more() {
    [[ ${#REST[@]} -eq 0 ]] || die "${REST[0]}: unknown; see $(basename "$0") --help"
}

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# A command as one could type it.
quoted() {
    local word out=()
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then out+=("$word"); else out+=("${word@Q}"); fi
    done
    printf '%s\n' "${out[*]}"
}

# Prints a command, and runs it unless this is a dry run.
run() {
    if ((DRY_RUN)); then
        quoted "$@"
    else
        say "+ $(quoted "$@")"
        "$@"
    fi
}

resource() { run gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }

# On every host of every slice, unless --node and --worker say otherwise.
on_all() { resource ssh "$NAME" --node=all --worker=all --command="$1"; }

# State of the queued resource, NONE where there is none. In a dry run everything is as it should be.
state() {
    local ask=(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" "--format=value(state.state)")
    if ((DRY_RUN)); then
        quoted "${ask[@]}" >&3
        printf 'ACTIVE\n'
        return 0
    fi
    local try answer
    for try in 1 2 3; do
        if answer=$("${ask[@]}" 2>&1); then
            printf '%s\n' "${answer##*$'\n'}"
            return 0
        fi
        if [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
            printf 'NONE\n'
            return 0
        fi
        ((try == 3)) || sleep "$POLL_SECONDS"
    done
    say "cannot tell the state of $NAME: ${answer##*$'\n'}"
    return 1
}

# Why a request failed, as the service says it.
reason() {
    gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
        "--format=value(state.failedData.error.message)" 2>/dev/null || true
}

# Deletes the resource with its machines, and makes sure that it is gone. Fails loudly where it is not.
remove() {
    local try
    if ((DRY_RUN)); then
        resource delete "$NAME" --force --quiet
        return 0
    fi
    for try in 1 2 3 4 5; do
        case $(state || printf 'UNKNOWN') in
            NONE) return 0 ;;
            DELETING) ;;
            *) resource delete "$NAME" --force --quiet || say "deleting $NAME failed (try $try)" ;;
        esac
        [[ $(state || printf 'UNKNOWN') == NONE ]] && return 0
        sleep "$POLL_SECONDS"
    done
    say "$NAME IS STILL THERE AND MAY BE BILLED. Delete it by hand:"
    say "  $(quoted gcloud compute tpus queued-resources delete "$NAME" --force "${WHERE[@]}")"
    return 1
}

# To be set as a trap: what is rented is given back when a script fails, unless --keep was given.
give_back_on_failure() {
    local code=${1:-$?}
    trap - EXIT
    if ((code && !KEEP && !DRY_RUN)); then
        say "failed with $code: giving $NAME back (--keep would leave it)"
        remove || true
    fi
    exit "$code"
}
