#!/usr/bin/env bash
# Pre-training on all GPUs of this machine, or of several machines.
#
#   torchrun.sh RECIPE --data PATH --out DIR [...]                                   # one machine
#   NODES=4 HEAD=node0:29500 torchrun.sh RECIPE --data PATH --out DIR [...]          # the same on each of four
#
# HEAD: any one of the machines, and a port of it that the others reach. Every machine sees PATH; the first process
# writes DIR. Stopped or crashed, the run goes on with the same command. PROCESSES: for each machine (default: its GPUs).
set -euo pipefail

[ $# -gt 0 ] || {
    echo "torchrun.sh: expected what lowssl-pretrain takes: RECIPE --data PATH --out DIR" >&2
    exit 2
}
nodes=${NODES:-1}
if [ "$nodes" -gt 1 ]; then
    meeting=(--rdzv-backend c10d --rdzv-endpoint "${HEAD:?expected HEAD=HOST:PORT, the same on every machine}"
        --rdzv-id "${RUN:-lowssl}")
else
    meeting=(--standalone)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # views are made by worker processes
exec torchrun --nnodes "$nodes" --nproc-per-node "${PROCESSES:-gpu}" "${meeting[@]}" \
    -m lowssl_core.pretrain "$@" --resume
