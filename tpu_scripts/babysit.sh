#!/usr/bin/env bash
# Sees a bake through: rents, sets up, starts, watches, rents anew after a preemption, fetches, gives everything back.
# Ends with 0 and the results in RESULTS, or with one clear error; in either case nothing is left rented (unless --keep).
# A queued resource that was taken away stays SUSPENDED for ever: it is deleted, and a new one asked for. The bake
# goes on from its last checkpoint in OUTPUT.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

flags=(--keep --settings "$SETTINGS")
((DRY_RUN)) && flags+=(--dry-run)
recreated=0
restarted=0
given_back=0

leave() {
    local code=$?
    trap - EXIT INT TERM
    if ((given_back)); then
        :
    elif ((KEEP)); then
        say "$NAME was left as it is (--keep); delete.sh gives it back"
    elif ! remove; then
        code=1
    fi
    exit "$code"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

rent_anew() {
    remove || die "$NAME could not be deleted, so it cannot be rented anew"
    ((++recreated <= MAX_RECREATES)) || die "gave up after renting $MAX_RECREATES times anew: $1"
    say "$1; renting anew ($recreated of at most $MAX_RECREATES)"
}

in_time() {
    ((SECONDS < MAX_SECONDS)) || die "MAX_SECONDS=$MAX_SECONDS have passed; what is baked so far is in $OUTPUT"
}

# Returns when the resource is ACTIVE.
acquire() {
    local since=$SECONDS now why said
    while true; do
        in_time
        now=$(state) || die "no answer about $NAME"
        case $now in
            ACTIVE) return 0 ;;
            NONE)
                if ! said=$("$HERE/create.sh" "${flags[@]}" 2>&1); then
                    say "$said"
                    die "could not ask for $ACCELERATOR_TYPE in $ZONE: ${said##*$'\n'}"
                fi
                say "$said"
                since=$SECONDS
                continue
                ;;
            SUSPENDED)
                rent_anew "$NAME was taken away"
                since=$SECONDS
                continue
                ;;
            FAILED)
                why=$(reason)
                [[ ${why,,} != *quota* ]] || die "quota does not allow $ACCELERATOR_TYPE in $ZONE: $why"
                rent_anew "the request failed: ${why:-no reason given}"
                ;;
            CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | DELETING | SUSPENDING) ;;
            *) die "$NAME: unknown state '$now'" ;;
        esac
        ((SECONDS - since < WAIT_SECONDS)) ||
            die "no capacity for $ACCELERATOR_TYPE in $ZONE within $WAIT_SECONDS s ($now)"
        sleep "$POLL_SECONDS"
    done
}

# Installs and starts on every host; 1 where a machine is gone. What fails twice on machines that answer is an error.
prepare() {
    local try
    for try in 1 2; do
        "$HERE/setup.sh" "${flags[@]}" && "$HERE/run.sh" "${flags[@]}" && return 0
        [[ $(state) == ACTIVE ]] && on_all true >/dev/null 2>&1 || return 1
        say "setting up failed (try $try)"
    done
    die "setting up failed twice, though every host answers; what went wrong stands above"
}

# Sets `outcome`: finished, restart (the machines are there, a process is not), or lost (a machine is not).
watch() {
    local silent=0 stragglers=0 now report codes
    while true; do
        in_time
        outcome=lost
        now=$(state) || now=UNKNOWN
        [[ $now == ACTIVE || $now == UNKNOWN ]] || return 0
        if [[ $now == UNKNOWN ]] || ! report=$(on_all "bash ~/jaxbake/tpu_scripts/host.sh status" 2>/dev/null); then
            ((++silent < UNREACHABLE_POLLS)) || return 0
            sleep "$POLL_SECONDS"
            continue
        fi
        silent=0
        if ((DRY_RUN)); then
            printf '%s\n' "$report"
            outcome=finished
            return 0
        fi
        codes=$(awk '$1 == "worker" && $3 == "exit" {print $4}' <<<"$report" | sort -un)
        if grep -q '^worker .* running$' <<<"$report"; then
            if [[ -z $codes || $codes == 0 ]]; then
                stragglers=0
            elif ((++stragglers > STRAGGLER_POLLS)); then
                on_all "bash ~/jaxbake/tpu_scripts/host.sh stop" || true
            fi
        elif [[ $codes == 0 ]] && ! grep -q '^worker .* idle$' <<<"$report"; then
            outcome=finished
            return 0
        elif grep -qxE '1|2' <<<"$codes"; then
            resource ssh "$NAME" --node=0 --worker=0 --command="bash ~/jaxbake/tpu_scripts/host.sh log 20" || true
            die "the bake ended with an error (exit code $(tr '\n' ' ' <<<"$codes" | sed 's/ *$//')); its last words are above"
        else
            outcome=restart
            return 0
        fi
        sleep "$POLL_SECONDS"
    done
}

((DRY_RUN)) && "$HERE/create.sh" "${flags[@]}"
while true; do
    acquire
    outcome=lost
    if prepare; then
        watch
    fi
    case $outcome in
        finished) break ;;
        lost) rent_anew "a machine of $NAME is gone or does not answer" ;;
        restart)
            sleep "$POLL_SECONDS" # a preemption shows in the state a little later
            if [[ $(state) == ACTIVE ]]; then
                ((++restarted <= MAX_RESTARTS)) || die "gave up after $MAX_RESTARTS restarts on machines that stayed"
                say "a process left; starting again ($restarted of at most $MAX_RESTARTS)"
            fi
            ;;
    esac
done
if ((!KEEP)); then
    remove || die "the bake is finished, but $NAME could not be deleted"
    given_back=1
fi
"$HERE/fetch.sh" "${flags[@]}"
((DRY_RUN)) || say "done: $RESULTS"
