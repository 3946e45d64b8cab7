#!/usr/bin/env bash
# Trains on this machine, on N processes, and resumes if the run exists:
#   launch/local.sh [-n N] CONFIG [--table.key value ...]
set -euo pipefail

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
if ((processes == 1)); then
    command=("$bin/longctx" train "$@")
else
    # A mistake is told once, before any process starts.
    "$bin/longctx" check "${1:-}" "$processes" "${@:2}"
    command=("$bin/torchrun" --standalone --nproc-per-node "$processes" -m longctx train "$@")
fi
echo "+ ${command[*]@Q}"
exec "${command[@]}"
