#!/usr/bin/env bash
# Asks for the TPU: a queued resource of SLICES slices, spot or on demand. It may wait in the queue; see wait.sh.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

ask=(create "$NAME" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
if ((SLICES > 1)); then
    ask+=(--node-count="$SLICES" --node-prefix="$NAME")
else
    ask+=(--node-id="$NAME")
fi
((SPOT)) && ask+=(--spot)
[[ -n $VALID_UNTIL_DURATION ]] && ask+=(--valid-until-duration="$VALID_UNTIL_DURATION")
[[ -n $SERVICE_ACCOUNT ]] && ask+=(--service-account="$SERVICE_ACCOUNT")

if ((!DRY_RUN)); then
    found=$(state)
    [[ $found == NONE ]] || die "$NAME is there already ($found); delete.sh gives it back, or choose another NAME"
fi
trap give_back_on_failure EXIT
resource "${ask[@]}"
