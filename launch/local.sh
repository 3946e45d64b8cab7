#!/usr/bin/env bash
# Trains on this machine, on N processes, and resumes if the run exists:
#   launch/local.sh [-n N] CONFIG [--table.key value ...]
# It ends like longctx train (75: a signal stopped the run after it saved), and no process outlives
# it. torchrun would turn every code but 0 into 1.
set -euo pipefail

seconds_for_others=10 # for the other processes to tell what they saw, when one has failed
processes=1
if [[ ${1:-} == -n ]]; then
    processes=${2:?'launch/local.sh: -n needs a number of processes'}
    shift 2
fi
bin=$(dirname "$(command -v longctx || echo "$(dirname "$0")/../.venv/bin/longctx")")
if [[ ! -x $bin/longctx ]]; then
    echo "launch/local.sh: longctx is not installed here; run: make setup" >&2
    exit 1
fi
# Threads that wait sleep instead of spinning: spinning costs most of the speed on shared cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
command=("$bin/longctx" train "$@")
if ((processes == 1)); then
    echo "+ ${command[*]@Q}"
    exec "${command[@]}"
fi

# From here on processes die with this one. A mistake is told once, before any of them trains.
export LONGCTX_LAUNCHER=$$
"$bin/longctx" check "${1:-}" "$processes" "${@:2}"
export WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$processes
export MASTER_ADDR=127.0.0.1 MASTER_PORT GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
MASTER_PORT=$("$bin/python" -m longctx.launch.ports)
echo "+ RANK=0..$((processes - 1)) WORLD_SIZE=$processes MASTER_ADDR=$MASTER_ADDR" \
    "MASTER_PORT=$MASTER_PORT ${command[*]@Q}"
ranks=()
for ((rank = 0; rank < processes; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "${command[@]}" &
    ranks+=($!)
done

code=0
deadline=0
interrupts=0
pass_on() {
    kill -s "$1" "${ranks[@]}" 2> /dev/null || true
}
# A terminal sends Ctrl-C to all of them by itself. The first one stops the run as SIGTERM does.
# shellcheck disable=SC2329
interrupt() {
    interrupts=$((interrupts + 1))
    pass_on TERM
    if ((interrupts > 1)); then
        code=130
        deadline=$SECONDS
    fi
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap interrupt INT

while ((${#ranks[@]})); do
    sleep 0.2 || true
    for i in "${!ranks[@]}"; do
        if ! kill -0 "${ranks[i]}" 2> /dev/null; then
            ended=0
            wait "${ranks[i]}" || ended=$?
            unset "ranks[i]"
            if ((ended != 0 && (code == 0 || code == 75))); then
                code=$ended
            fi
        fi
    done
    if ((code != 0 && code != 75)); then
        deadline=$((deadline ? deadline : SECONDS + seconds_for_others))
        if ((SECONDS >= deadline && ${#ranks[@]})); then
            pass_on KILL
        fi
    fi
done
exit "$code"
