#!/usr/bin/env bash
# Trains configs one after another on this machine, as the stages of a ladder of contexts:
#   launch/ladder.sh [-n N] CONFIG... [-- --table.key value ...]
# Each starts from the one before it if its run.init_from says so. The first that does not finish
# ends this with its exit code; the same command goes on there.
set -euo pipefail

shape=()
if [[ ${1:-} == -n ]]; then
    shape=(-n "${2:?'launch/ladder.sh: -n needs a number of processes'}")
    shift 2
fi
configs=()
while (($#)) && [[ $1 != -* ]]; do
    configs+=("$1")
    shift
done
if ((${#configs[@]} == 0)) || [[ ${1:---} != -- ]]; then
    echo 'launch/ladder.sh: give config files, then -- and options' >&2
    exit 2
fi
options=("${@:2}")

stage=
stopping=0
# shellcheck disable=SC2329
pass_on() {
    stopping=$((stopping + 1))
    kill -s "$1" "$stage" 2> /dev/null || true
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap 'if ((stopping)); then pass_on KILL; else pass_on TERM; fi' INT # a second Ctrl-C does not wait
for config in "${configs[@]}"; do
    "$(dirname "$0")/local.sh" "${shape[@]}" "$config" "${options[@]}" &
    stage=$!
    while kill -0 "$stage" 2> /dev/null; do
        sleep 0.2 || true
    done
    code=0
    wait "$stage" || code=$?
    if ((code == 0 && stopping)); then code=75; fi
    ((code == 0)) || exit "$code"
done
