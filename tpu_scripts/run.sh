#!/usr/bin/env bash
# Starts the bake on every host and leaves it running; status.sh, logs.sh and babysit.sh look after it.
# Running already, it stays as it is. Interrupted before, it goes on from its last checkpoint in OUTPUT.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

read -r -a recipes <<<"$RECIPE"
((${#recipes[@]})) || die "RECIPE: is empty; name a recipe, or several"
for recipe in "${recipes[@]}"; do
    [[ -f $ROOT/$recipe ]] || die "RECIPE=$recipe: no such file in $ROOT"
done
bake=bake
((${#recipes[@]} > 1)) && bake='bake-many'
flags=(--pod)
((SPOT)) && flags+=(--preemptible)
[[ -n $MESH ]] && flags+=(--mesh "$MESH")
read -r -a more <<<"$BAKE_FLAGS"
token=''
[[ -n $HF_SECRET ]] && token="HF_TOKEN=\$(gcloud secrets versions access latest --secret=$HF_SECRET) "

trap give_back_on_failure EXIT
on_all "cd ~/jaxbake && ${token}JAXBAKE_CACHE=$COMPILE_CACHE PATH=~/jaxbake-env/bin:\$PATH \
bash tpu_scripts/host.sh start $(quoted jaxbake $bake "${recipes[@]}" "${flags[@]}" --output "$OUTPUT" "${more[@]}")"
