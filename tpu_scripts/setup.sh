#!/usr/bin/env bash
# Copies this repository to every host and installs it there, with a Python of its own. Safe to run again.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
start "$@"
no_more

bundle=${TMPDIR:-/tmp}/jaxbake-$NAME.tgz
trap 'code=$?; rm -f "$bundle"; give_back_on_failure "$code"' EXIT
run tar --create --gzip --file="$bundle" --exclude-vcs --exclude=./runs --exclude=./build --directory="$ROOT" .
resource scp "$bundle" "$NAME:jaxbake.tgz" --node=all --worker=all
on_all "rm -rf ~/jaxbake && mkdir ~/jaxbake && tar --extract --gzip --file jaxbake.tgz --directory ~/jaxbake && \
python3 -m pip install --quiet --user --upgrade uv && \
~/.local/bin/uv venv --quiet --allow-existing --python $PYTHON_VERSION ~/jaxbake-env && \
~/.local/bin/uv pip install --quiet --python ~/jaxbake-env/bin/python \"\$HOME/jaxbake[tpu]\" gcsfs && \
~/jaxbake-env/bin/jaxbake --version"
