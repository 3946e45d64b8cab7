#!/usr/bin/env bash
# Trains on several hosts, and resumes if the run exists. Run it on each of them, with
#   NNODES=2 NODE_RANK=0 NPROC_PER_NODE=8 MASTER_ADDR=10.0.0.1 \
#       launch/torchrun.sh CONFIG [--table.key value ...]
# and another NODE_RANK. All hosts need the same files at the same paths: config, data, runs.
# It ends with 75 if a signal stopped the run after it saved; no process outlives it.
set -euo pipefail

nodes=${NNODES:-1}              # hosts
node=${NODE_RANK:-0}            # 0 on the host of MASTER_ADDR, which the others look for
per_node=${NPROC_PER_NODE:-gpu} # processes of this host; gpu means one for each GPU
address=${MASTER_ADDR:-127.0.0.1} # of host 0, as the others reach it
port=${MASTER_PORT:-29400}      # where host 0 listens; free there, and open to the others
name=${RDZV_ID:-longctx}        # of this job, if another one uses the same port
# How the others reach this host; empty means by its name. Host 0 is reached at MASTER_ADDR.
own_address=${LOCAL_ADDR:-}
restarts=${MAX_RESTARTS:-3}     # how often all start again from the last checkpoint after a failure
patience=${PATIENCE:-300}       # seconds to wait for the other hosts
# Which network torch uses, if it picks a wrong one: GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

fail() {
    echo "launch/torchrun.sh: $1" >&2
    exit "$2"
}
(($# > 0)) || fail 'give a config file or preset' 2
for count in "$nodes" "$node" "$port" "$restarts" "$patience"; do
    [[ $count =~ ^[0-9]+$ ]] || fail "'$count' is no number: see NNODES, NODE_RANK, MASTER_PORT, \
MAX_RESTARTS and PATIENCE" 2
done
((node < nodes)) || fail "NODE_RANK=$node: must be below NNODES=$nodes" 2
bin=$(dirname "$(command -v longctx || echo "$(dirname "$0")/../.venv/bin/longctx")")
[[ -x $bin/longctx ]] || fail 'longctx is not installed here; run: make setup' 1
if [[ $per_node == gpu ]]; then
    per_node=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
fi
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE=$per_node: give the number of processes" 2
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > per_node ? cores / per_node : 1))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

if ((node == 0)); then
    # A mistake is told once, before any process trains.
    "$bin/longctx" check "$1" "$((nodes * per_node))" "${@:2}"
    own_address=${own_address:-$address}
else
    # shellcheck disable=SC2016
    until timeout 5 bash -c ': < "/dev/tcp/$0/$1"' "$address" "$port" 2> /dev/null; do
        ((SECONDS < patience)) || fail "no answer from $address:$port within $patience s: start it \
with NODE_RANK=0 there; MASTER_ADDR and MASTER_PORT must be reachable from here" 1
        sleep 1
    done
fi

command=("$bin/python" -m longctx.parallel.agent --nnodes="$nodes" --nproc-per-node="$per_node"
    --max-restarts="$restarts" --monitor-interval=0.5 --rdzv-backend=c10d --rdzv-id="$name"
    --rdzv-endpoint="$address:$port"
    --rdzv-conf="is_host=$((node == 0)),join_timeout=$patience,last_call_timeout=3")
if [[ $own_address ]]; then
    command+=(--local-addr="$own_address")
fi
torch=$("$bin/python" -c 'import importlib.util as u; print(u.find_spec("torch").origin)')
if grep -q -- --signals-to-handle "${torch%/*}/distributed/run.py"; then
    command+=(--signals-to-handle=SIGQUIT)
fi
command+=(-m longctx train "$@")
echo "+ ${command[*]@Q}"

# Stopped processes end with 0, for torchrun would start failed ones again; this file says so.
folder=$(mktemp -d)
export LONGCTX_STOPPED_FILE=$folder/stopped
# Signals go to the trainers, which save. torchrun would kill them, so it hears none; it dies with
# this script where util-linux's setpriv is there, and the trainers die with it.
if command -v setpriv > /dev/null; then command=(setpriv --pdeathsig KILL "${command[@]}"); fi
(trap '' TERM INT HUP USR1 USR2 && exec "${command[@]}") &
agent=$!
interrupts=0
# shellcheck disable=SC2329
pass_on() {
    local trainers
    read -ra trainers < "/proc/$agent/task/$agent/children" || true
    kill -s "$1" "${trainers[@]}" 2> /dev/null || true
}
# shellcheck disable=SC2329
interrupt() {
    interrupts=$((interrupts + 1))
    pass_on TERM
    if ((interrupts > 1)); then kill -KILL "$agent"; fi # and the trainers die with it
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap interrupt INT
while kill -0 "$agent" 2> /dev/null; do
    sleep 0.5 || true
done
code=0
wait "$agent" || code=$?
if ((interrupts > 1)); then code=130; elif [[ -e $LONGCTX_STOPPED_FILE ]]; then code=75; fi
rm -rf "$folder"
exit "$code"
