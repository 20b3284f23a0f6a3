#!/usr/bin/env bash
# Trains with several ranks on this machine, without Ray: launch/local_torchrun.sh CONFIG [RANKS] [KEY=VALUE]...
set -euo pipefail
config=${1:?usage: launch/local_torchrun.sh CONFIG [RANKS] [KEY=VALUE]...} ranks=${2:-2}
shift $(($# < 2 ? $# : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --nnodes 1 --nproc-per-node "$ranks" --master-addr 127.0.0.1 --master-port "${MASTER_PORT:-29500}" \
  --no-python gentrain train "$config" cluster.place=inline "$@"
