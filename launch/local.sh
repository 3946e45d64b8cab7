#!/usr/bin/env bash
# Trains on this machine, and resumes if the run exists:
#   launch/local.sh CONFIG [--table.key value ...]
set -euo pipefail

longctx=$(command -v longctx || echo "$(dirname "$0")/../.venv/bin/longctx")
if [[ ! -x $longctx ]]; then
    echo "launch/local.sh: longctx is not installed here; run: make setup" >&2
    exit 1
fi
# Threads that wait sleep instead of spinning: spinning costs most of the speed on shared cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
command=("$longctx" train "$@")
echo "+ ${command[*]@Q}"
exec "${command[@]}"
